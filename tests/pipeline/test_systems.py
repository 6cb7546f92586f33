"""Real processes deprived of what other systems lack: Linux and C library calls, fork, fcntl and resource, /proc and
/sys."""

import ast
import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stages_run

from bessemer import system
from bessemer.addons.accelerate.helpers import Helpers
from bessemer.addons.accelerate.kernels import library
from bessemer.addons.tasks import referee, sandbox
from bessemer.errors import UserError
from bessemer.runs.directory import RunDir

ELSEWHERE = """
import os, signal, sys
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "pidfd_open", "memfd_create", "eventfd",
             "posix_fadvise", "posix_fallocate", "sendfile", "splice", "copy_file_range", "getrandom", "sysconf_names"):
    os.__dict__.pop(name, None)
for name in ("fcntl", "resource"):
    sys.modules[name] = None
tried = set()
def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc", "/sys", "/dev/shm")):
        tried.add(str(arguments[0]))
        raise FileNotFoundError(2, "not on this system", arguments[0])
    if event == "ctypes.dlopen" and str(arguments[0]).startswith("libc.so"):
        raise OSError("not the C library of this system")
    if event == "ctypes.dlsym" and arguments[1] in ("renameat2", "mallopt", "malloc_trim", "prctl"):
        tried.add(arguments[1])
        raise AttributeError(arguments[1])
sys.addaudithook(refuse)
"""
"""A sitecustomize, which every Python process imports if its folder is on the path."""

COMMANDS = """
import json, os, signal, sys, threading, time, urllib.request
import sitecustomize, torch
from bessemer import cli
torch.set_num_threads(1)  # other processes want the cores

def visit(address):
    body = json.dumps({"prompt": "a fox", "max_tokens": 3, "ignore_eos": True}).encode()
    request = urllib.request.Request(address + "/v1/completions", body, {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                print("tokens", json.load(reply)["usage"]["completion_tokens"])
                break
        except OSError:
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)

for arguments in json.loads(sys.argv[1]):
    if arguments[0] == "serve":
        threading.Thread(target=visit, args=[f"http://127.0.0.1:{arguments[-1]}"]).start()
    sys.argv = ["bessemer", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
print(json.dumps(sorted(sitecustomize.tried)))
"""

SMALLER = ("pretrain.tokens=4K", 'pretrain.lr=[["0", 1e-3]]', "zero.rollouts=1", "eval.problems=2", "eval.samples=2")


HOMES = {
    "fcntl": {"system.py"}, "resource": {"system.py"}, "os.sched_getaffinity": {"system.py"},
    "os.getrandom": set(), "os.eventfd": set(), "os.posix_fadvise": set(), "os.sendfile": set(),
    "termios": set(), "pwd": set(), "grp": set(), "pty": set(), "tty": set(),
    "os.fork": {"addons/accelerate/helpers.py", "addons/tasks/referee.py"},
    "os.pidfd_open": {"addons/tasks/sandbox/process.py"},
    "os.memfd_create": set(), "os.uname": set(), "os.copy_file_range": set(),
}  # fmt: skip
"""Modules and calls that some systems lack, and the only files that may use them, since these have a fallback."""


def test_what_a_system_may_lack_is_used_where_there_is_another_way():
    """This holds everywhere except inside the sandbox, which needs Linux."""
    package, strays = Path(system.__file__).parent, []
    words = re.compile(rf"\b({'|'.join(one.removeprefix('os.') for one in HOMES)})\b")
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        if name.startswith("addons/tasks/sandbox/inside/") or not words.search(text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            used = []
            if isinstance(node, ast.Import):
                used = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                used = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = [f"{node.value.id}.{node.attr}"]
            strays += [(name, one) for one in used if name not in HOMES.get(one, {name})]
    assert not strays


def test_a_run_a_data_build_doctor_and_a_server_need_none_of_it(tmp_path):
    """All run in one deprived process, and its children are deprived too. It is granted two cores, so it has to do the
    work of two."""
    (tmp_path / "sitecustomize.py").write_text(ELSEWHERE)
    recipe, out = stages_run.write_recipe(tmp_path), tmp_path / "run"
    (tmp_path / "data.toml").write_text(
        'name = "data"\nrow_length = 64\nheldout = 0.1\n[tokenizer]\nvocab_size = 300\n[engine]\nworkers = 1\n'
        f'[[source]]\nname = "text"\nfrom = "{tmp_path / "text.jsonl"}"\ndomain = "books"\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    sets = [argument for change in SMALLER for argument in ("--set", change)]
    commands = [
        ["data", "build", str(tmp_path / "data.toml"), "--out", str(tmp_path / "data")],
        ["run", str(recipe), "--out", str(out), *sets],
        ["doctor"],
        ["serve", str(out / "03-zero" / "model"), "--port", str(port)],
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(system.__file__).parents[1]}",
        "OMP_NUM_THREADS": "2",
        "BESSEMER_KERNELS": library.status().instructions,  # normally from /proc; the suite has built these
    }
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert {path.parent.name for path in out.glob("*/done.json")} == {"01-corpus", "02-pretrain", "03-zero", "04-eval"}
    assert (tmp_path / "data" / "manifest.json").exists()
    *output, tried = done.stdout.splitlines()
    assert "tokens 3" in output and "everything else runs here" in done.stdout
    assert "/proc/vmstat" in json.loads(tried)  # the restrictions were active


@pytest.fixture
def no_pidfd(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    sandbox.trial.cache_clear()
    yield
    sandbox.trial.cache_clear()


@pytest.mark.usefixtures("no_pidfd")
def test_without_linux_code_is_refused_in_one_sentence_that_says_what_works(monkeypatch):
    monkeypatch.setenv(sandbox.FORCE, "1")
    with pytest.raises(UserError, match=r"^code is not run here, .* need Linux .*"):
        sandbox.run("print(1)")
    assert sandbox.level() == "none" and sandbox.run("print(1)", seconds=10, isolation="none").stdout == "1\n"


def test_verdicts_by_libraries_are_refused_where_no_process_can_be_forked(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert "cannot fork processes" in referee.confined(dict)["error"]


def test_a_run_directory_is_held_by_a_living_process_where_files_cannot_be_locked(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "fcntl", None)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / ".lock").write_text(f"{other.pid} 0\n")
    with pytest.raises(UserError, match=rf"in use by another run \(process {other.pid}\)"):
        RunDir(tmp_path)
    other.communicate(b"")
    with RunDir(tmp_path) as opened:
        assert f"(process {other.pid}) was killed" in opened.killed
        opened.check()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_mac_counts_memory_in_bytes_and_its_files_to_10240(monkeypatch):
    """macOS refuses the very limit that it reports as infinite."""
    raw, asked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.peak_memory() >= raw << 10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert raw <= system.peak_memory() < raw << 9
    assert not system.can_fork() and Helpers(4).n == 1

    def setrlimit(kind, limits):
        asked.append(limits[0])
        if limits[0] > 10_240:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(system.resource, "getrlimit", lambda kind: (256, 1 << 62))
    monkeypatch.setattr(system.resource, "setrlimit", setrlimit)
    system.raise_open_files()
    assert asked == [1 << 62, 10_240]


def test_windows_shows_help_and_names_the_way(monkeypatch, call):
    monkeypatch.setattr(sys, "platform", "win32")
    for command in ("run", "serve", "doctor"):
        assert call(command, "--help")[0] == 0
    status, _, output = call("recipes")
    assert status == 2 and output.count("\n") == 1 and "WSL 2" in output
