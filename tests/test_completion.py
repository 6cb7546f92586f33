"""Completion is typer's: a shell's script asks the program, which answers without importing torch."""

import os
import subprocess
import sys

import pytest

from bessemer.config.builtin import builtin_recipes


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("bessemer conv", {"convert"}),
        ("bessemer run --dry", {"--dry-run"}),
        ("bessemer eval --shot-kind oth", {"other-language"}),
        ("bessemer run r1", {name for name in builtin_recipes() if name.startswith("r1")}),
        ("bessemer nothing x", set()),
    ],
)
def test_shell_completions(tmp_path, words, offered):
    (tmp_path / "torch.py").write_text("raise SystemExit('a key press must not wait for torch')")
    environment = {
        "_BESSEMER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    program = [sys.executable, "-m", "bessemer"]
    answer = subprocess.run(program, env=os.environ | environment | path, capture_output=True, text=True, timeout=60)
    assert set(answer.stdout.split()) == offered, answer.stderr


def test_the_script_is_printed():
    program = [sys.executable, "-m", "bessemer", "--show-completion"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run([*program, "bash"], env=environment, capture_output=True, text=True, timeout=60).stdout
    assert "_BESSEMER_COMPLETE" in script
