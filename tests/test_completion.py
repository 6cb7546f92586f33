"""`bessemer completion`: it offers what the parser knows, and a real bash inserts it."""

import os
import pty
import select
import shutil
import subprocess
import sys

import pytest
import typer

from bessemer import cli
from bessemer.cli.completion import SCRIPTS, Shell, candidates
from bessemer.config.builtin import builtin_recipes
from bessemer.config.kinds import CORE
from bessemer.runs.trackers import TRACKERS


def offered(line):
    """The words offered to complete the last word of a line."""
    return [word for word, _ in candidates(line.split(" "))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, stage in (("tiny", "03-zero"), ("my run", "01-base")):
        (tmp_path / "runs" / run / stage / "model").mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.toml").write_text(f'name = "{run}"\n')
    (tmp_path / "runs" / "tiny" / "01-corpus").mkdir()
    (tmp_path / "runs" / "none").mkdir()
    (tmp_path / "thesis.toml").write_text("")
    (tmp_path / "texts").mkdir()
    return tmp_path


def test_every_command_and_every_option_is_offered():
    def walk(command, path):
        inner = {}
        if hasattr(command, "list_commands"):
            inner = {name: command.get_command(None, name) for name in command.list_commands(None)}
            assert offered(" ".join([*path, ""])) == [*inner]
        options = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
        assert offered(" ".join([*path, "--"])) == [*(name for name in options if name.startswith("--")), "--help"]
        for name, each in inner.items():
            walk(each, [*path, name])

    walk(typer.main.get_command(cli.app), [])
    assert offered("rep") == ["report", "replay"] and offered("dat") == ["data"]
    assert dict(candidates(["re"]))["report"].startswith("Write a run's report card")


def test_values(folder):
    training, data = ([*builtin_recipes(kind)] for kind in (False, True))
    assert offered("run ") == training and offered("data build ") == data
    assert offered("recipes ") == [*training, *data] and offered("init x.toml --from ") == training
    assert offered("run t") == ["tiny", "tools", "thesis.toml", "texts/"]
    assert offered("chat ") == ["runs/my run", "runs/tiny"] and offered("chat ru") == [*offered("chat "), "runs/"]
    assert offered("chat runs/tiny/") == ["runs/tiny/zero"], "stages with a model"
    assert offered("report runs/tiny ") == ["runs/my run", "runs/tiny"], "as many runs as one likes"
    assert "model" in offered("keys m")
    assert offered("keys r") == [kind for kind in CORE if kind.startswith("r")]
    assert offered("eval runs/tiny --shot-kind ") == ["worked", "direct", "other-language", "fables"]
    assert offered("eval --shot-kind=d") == ["--shot-kind=direct"]
    assert offered("convert --to g") == ["gguf"] and offered("convert --to gguf runs/t") == ["runs/tiny"]
    assert offered("track runs/tiny --to ") == [*TRACKERS] and offered("track --to wandb,tr") == ["wandb,trackio"]
    assert offered("run --until x --dry-run ti") == ["tiny"], "flags take no word"
    assert offered("run -- --") == [] and offered("run tiny ") == [] and offered("nothing ") == []
    assert offered("eval --task ") == [], "files are the shell's business"


def test_what_the_scripts_read(call, folder):
    assert call("completion", "bash", "--", "chat", "runs/t") == (0, "runs/tiny\n", "")
    assert "\nzero\tR1-Zero with twenty minutes" in call("completion", "fish", "--", "whatif", "zer")[1]
    (folder / "runs" / "a:b\\c").mkdir()
    (folder / "runs" / "a:b\\c" / "recipe.toml").write_text("")
    (folder / "runs" / "new\nline").mkdir()
    (folder / "runs" / "new\nline" / "recipe.toml").write_text("")
    escaped = "runs/a\\:b\\\\c:\nruns/my run:\nruns/tiny:\n"
    assert call("completion", "zsh", "--", "chat", "runs/")[1] == escaped, "and no folder that is no run"
    assert call("completion", "zsh", "--", "convert", "te")[1] == "texts/:\n"
    status, _, err = call("completion", "tcsh")
    assert status == 2 and "tcsh" in err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_real_bash_completes(folder):
    """Keys typed into a terminal: TAB after each beginning; the completed line is printed, not run."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "bessemer"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bessemer "$@"\n')
    program.chmod(0o755)
    (folder / "bin" / "torch.py").write_text("raise SystemExit('a key press must not wait for torch')")
    (folder / "script").write_text(SCRIPTS[Shell.bash])
    search = f"{program.parent}:{os.environ['PATH']}"
    paths = f"{program.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PATH": search, "PYTHONPATH": paths, "INPUTRC": "/dev/null", "TERM": "dumb"}
    keyboard, terminal = pty.openpty()
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    beginnings = ("conv", "eval --shot-kind=oth", "report runs/m", "convert tex", "chat --system thesi")
    try:
        os.write(keyboard, b"PS1=; source ./script\n")
        for beginning in beginnings:  # Ctrl-A and Ctrl-E: start and end of the line
            os.write(keyboard, f"bessemer {beginning}\t\x01printf '<%s>' \x05; echo\n".encode())
        os.write(keyboard, b"exit\n")
        screen = b""
        while select.select([keyboard], [], [], 60)[0]:
            try:
                screen += os.read(keyboard, 65536)
            except OSError:  # the terminal is closed
                break
    finally:
        bash.kill()
        bash.wait()
        os.close(keyboard)
    found = [line for line in screen.decode().splitlines() if line.startswith("<bessemer>")]
    assert found == [
        "<bessemer><convert>", "<bessemer><eval><--shot-kind=other-language>", "<bessemer><report><runs/my run>",
        "<bessemer><convert><texts/>", "<bessemer><chat><--system><thesis.toml>",
    ], screen.decode()  # fmt: skip
