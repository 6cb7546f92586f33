"""A data recipe that several of these tests use."""

from pathlib import Path

import pytest


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a small data recipe: recipe(sources..., more lines) -> its path."""

    def write(*sources: str, more: str = "", unit: int = 20_000) -> Path:
        tables = "\n".join(f"[[source]]\n{source}" for source in sources)
        text = (
            'name = "small"\nseed = 3\nrow_length = 64\nheldout = 0.1\n'
            f"{more}\n[tokenizer]\nvocab_size = 600\n{tables}\n[engine]\nunit_bytes = {unit}\nworkers = 1\n"
        )
        path = tmp_path / "data.toml"
        path.write_text(text, "utf-8")
        return path

    return write
