"""The sandbox against malicious programs. Every isolation level that works on this machine is tried, none is mocked."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path

import pytest

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.clock import speed
from bessemer.addons.tasks.sandbox import judge, run, same
from bessemer.addons.tasks.sandbox.process import PROCESSES
from bessemer.errors import UserError

from .hostile_programs import CLINGING, HOSTILE, IMPORTS, PROBES

ISOLATED = [name for name in ("bubblewrap", "namespaces") if not sandbox.trial(name)]
ALL = [*ISOLATED, "none"]
isolated = pytest.mark.parametrize("isolation", ISOLATED)
every = pytest.mark.parametrize("isolation", ALL)
SECRET = "a-secret-of-the-parent"


def test_a_real_level_works_where_the_kernel_has_user_namespaces():
    """This ensures that the tests below do not run over an empty list of levels."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make a user namespace")
    assert "namespaces" in ISOLATED, sandbox.trial("namespaces")
    assert sandbox.level() in ISOLATED and sandbox.resolve_level() == sandbox.level()


# ---- running a program


@every
@pytest.mark.parametrize(
    ("program", "status", "stdout", "stderr"),
    [
        ("print(input()[::-1])", "ok", "éba\n", ""),
        ("import sys; print('out'); print('err', file=sys.stderr); sys.exit(0)", "ok", "out\n", "err"),
        ("print('half'); raise SystemExit(3)", "error", "half\n", ""),
        ("1/0", "error", "", "ZeroDivisionError"),
        ("def f(:", "error", "", "SyntaxError"),
        ("x = 'a' * 10**10", "memory", "", "MemoryError"),
        ("print('begun', flush=True)\nwhile True: pass", "timeout", "begun\n", ""),
        ("import os; os.kill(os.getpid(), 11)", "error", "", ""),
        (
            "import sys\nif __name__ == '__main__': print(sys.argv, hash('a') == hash('a'))",
            "ok",
            "['program'] True\n",
            "",
        ),
    ],
)
def test_run(isolation, program, status, stdout, stderr):
    result = run(program, stdin="abé\n", seconds=0.5 if status == "timeout" else 5, isolation=isolation)
    assert (result.status, result.stdout) == (status, stdout) and stderr in result.stderr


@every
def test_a_flood_is_cut_while_it_is_read(isolation):
    result = run("while True: print('x' * 1000)", seconds=10, output_kb=8, isolation=isolation)
    assert result.status == "output" and len(result.stdout) == 8192 and result.seconds < 5
    result = run("import os\nwhile True: os.write(2, b'e' * 4096)", seconds=10, output_kb=8, isolation=isolation)
    assert result.status == "output" and len(result.stderr) == 8192


def test_much_input_and_a_program_that_does_not_read_it():
    text = "a" * 99_999
    assert run("import sys; print(len(sys.stdin.read()))", stdin=text, seconds=5).stdout == "99999\n"
    assert run("print(1)", stdin=text, seconds=5).status == "ok"


def test_the_same_program_gives_the_same(capfd):
    program = "print({'a', 'b', 'c', 'd', 'e', 'f'}, list(map(hash, 'abc')))"
    assert len({run(program, seconds=5).stdout for _ in range(3)}) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda: run("", seconds=0), "60 seconds"),
        (lambda: run("", memory_mb=8), "64 to 4096 MB"),
        (lambda: run("x" * 200_000), "too many"),
        (lambda: judge("", "f", []), "at least one test"),
        (lambda: judge("", "f()", [([], 1)]), "name of a function"),
    ],
)
def test_an_error_names_the_fix(wrong, hint):
    with pytest.raises(ValueError, match=hint):
        wrong()


# ---- isolation

PROBE = """
import ctypes, json, os, resource, socket, sys, time
def libc(name, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)
found = {}
for name, code in json.loads(sys.stdin.read()).items():
    try:
        found[name] = 'OPEN ' + repr(eval(code))[:80]
    except (OSError, ImportError, ValueError) as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


def numbers() -> dict[str, int]:
    """This machine's system call numbers as the sandbox knows them."""
    inside = Path(sandbox.__file__).parent / "inside"
    code = "import confine, json, os; print(json.dumps(confine.NUMBERS.get(os.uname().machine, {})))"
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=inside, capture_output=True, check=True).stdout)


@isolated
def test_nothing_outside_can_be_reached(isolation, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    calls = numbers()
    probes = {name: re.sub(r"{(\w+)}", lambda m: str(calls[m[1]]), code) for name, code in PROBES.items()}
    result = run(PROBE, stdin=json.dumps(probes), seconds=10, isolation=isolation)
    outcomes = json.loads(result.stdout)
    assert outcomes.keys() == PROBES.keys() and len(outcomes) >= 50
    assert [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("OPEN")] == []


def test_probes_detect_open_access():
    names = ["the password file", "this file", "the repository", "the host's processes", "its own environment by file"]
    probes = json.dumps({name: PROBES[name] for name in names})
    outcomes = json.loads(run(PROBE, stdin=probes, seconds=10, isolation="none").stdout)
    assert all(outcome.startswith("OPEN") for outcome in outcomes.values()) and list(outcomes) == names


@isolated
def test_nothing_of_the_parent_is_inherited(isolation, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
import os
print(sorted(os.environ), os.getcwd(), os.listdir('.'), os.getuid(), os.getgid(), os.getgroups() or 'no groups')
open_ones = []
for fd in range(3, 1024):
    try: os.fstat(fd); open_ones.append(fd)
    except OSError: pass
print(len(open_ones))
"""
        lines = run(program, seconds=5, isolation=isolation).stdout.splitlines()
    allowed = {"LC_CTYPE", "MALLOC_ARENA_MAX", "PWD", "PYTHONHASHSEED"}  # PWD is bubblewrap's, LC_CTYPE Python's own
    names, rest = lines[0].split("]", 1)
    assert set(re.findall(r"\w+", names)) <= allowed
    assert rest.startswith(" /tmp [] 65534 65534")
    assert lines[1] == "2"  # the two pipes of the protocol


@isolated
def test_scratch_is_small_and_gone_afterwards(isolation):
    write = "open('/tmp/here', 'w').write('x'); print(open('here').read())"
    assert run(write, seconds=5, isolation=isolation).stdout == "x\n"
    program = "\nfor n in range(64):\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(1 << 20))\nprint('full')"
    result = run("import os; print(os.listdir('/tmp'))" + program, seconds=5, isolation=isolation)
    assert result.stdout == "[]\n" and "No space left" in result.stderr


def test_system_call_numbers_match_those_of_the_kernel_headers():
    places = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
    header = Path(places.get(os.uname().machine, "/absent"))
    if not header.exists():
        pytest.skip("the kernel's headers are not installed; what the filter refuses is tried above")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    assert {name: int(defined[name]) for name in numbers() if name in defined} == numbers()


# ---- nothing is left behind


def below(pid: int) -> set[tuple[int, str]]:
    """(pid, start time) of `pid` and all its descendants; works across pid namespaces."""
    parents, started = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(name)], started[int(name)] = int(fields[1]), fields[19]
    pids, new = set(), {pid}
    while new:
        pids |= new
        new = {child for child, parent in parents.items() if parent in pids} - pids
    return {(pid, started[pid]) for pid in pids if pid in started}


def alive(processes: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Those that still exist, zombies included; killed ones get two seconds to leave the kernel's process table."""
    limit = time.monotonic() + 2
    while True:
        running = {child for number, _ in processes for child in below(number) if child in processes}
        if not running or time.monotonic() > limit:
            return running
        time.sleep(0.02)


@contextmanager
def watching(pid: int):
    """Yield a set that collects every process that appears below `pid` while the block runs."""
    seen, done, before = set(), threading.Event(), below(pid)  # before: itself, other tests' referee

    def look():
        while not done.wait(0.03):
            seen.update(below(pid) - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@isolated
@pytest.mark.parametrize("name", CLINGING)
def test_no_process_is_left_behind(isolation, name):
    ends = name == "an orphan left behind"
    began = PROCESSES / 2 if name.startswith("fork") else 2  # 2: the launcher and the program
    for seconds in [10] if ends else [0.5, 2, 8]:  # a busy machine may not have started the program in 0.5 s
        with watching(os.getpid()) as seen:
            result = run(IMPORTS + CLINGING[name], seconds=seconds, isolation=isolation)
        assert result.status == ("ok" if ends else "timeout")
        assert alive(seen) == set()
        if began <= len(seen):
            return
    raise AssertionError(f"{len(seen)} processes were seen, not {began:.0f}: the program did not begin")


@pytest.mark.parametrize("name", CLINGING)
def test_without_isolation_no_process_is_started(name):
    if not numbers():
        pytest.skip("this machine's system calls are not known, so nothing refuses them")
    with watching(os.getpid()) as seen:
        run(IMPORTS + CLINGING[name], seconds=0.3, isolation="none")
    assert len(seen) <= 1 and alive(seen) == set()  # a program that ends between two polls is not seen
    program = IMPORTS + "print([libc.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58)])"
    assert os.uname().machine != "x86_64" or run(program, seconds=5, isolation="none").stdout == "[-1, -1, -1]\n"


@every
def test_sandbox_dies_with_its_parent(isolation):
    program = IMPORTS + "libc.prctl(1, 0)\nif os.fork() == 0: libc.prctl(1, 0)\ntime.sleep(60)"
    if isolation == "none":  # this level only ends programs that do not resist
        program = "import time; time.sleep(60)"
    code = f"from bessemer.addons.tasks import sandbox; sandbox.run({program!r}, seconds=60, isolation={isolation!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    inside = 1 if isolation == "none" else 4  # otherwise the launcher, pid 1, the program and its child
    limit = time.monotonic() + 20
    while len(seen := below(parent.pid)) < 1 + inside and time.monotonic() < limit:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert len(seen) == 1 + inside
    limit = time.monotonic() + 10
    while alive(seen) and time.monotonic() < limit:
        time.sleep(0.05)
    assert alive(seen) == set()


def test_a_fork_bomb_leaves_the_machine_usable():
    bombs = [run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=0.3) for _ in range(3)]
    assert [bomb.status for bomb in bombs] == ["timeout"] * 3
    assert max(bomb.seconds for bomb in bombs) < 5 and run("print(1)", seconds=5).stdout == "1\n"


# ---- judging

TESTS = [([2], 5), ([0], 1), ([7], 50), ([-3], 10)]
RIGHT = "def f(n):\n    return n * n + 1"
NODE = 'from dataclasses import dataclass\n@dataclass\nclass Node:\n    left: "Node" = None\n'


@every
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (RIGHT, "correct"),
        ("f = lambda n: n ** 2 + 1", "correct"),
        ("print('hello')\nclass C:\n    def __call__(self, n): return float(n * n + 1)\nf = C()", "correct"),
        (NODE + RIGHT, "correct"),
        ("def f(n):\n    return n + n + 1", "wrong-output"),
        ("def f(n):\n    return str(n * n + 1)", "wrong-output"),
        ("def f(n):\n    return 10 // n", "error"),  # right for 2, then divides by 0
        ("def f():\n    return 5", "error"),
        ("def g(n):\n    return n * n + 1", "no-function"),
        ("f = 5", "no-function"),
        ("def f(n) return 5", "syntax-error"),
        ("", "no-function"),
        ("def f(n):\n    return 'a' * 10**10", "memory"),
        ("def f(n):\n    while True: pass", "timeout"),
        ("def f(n):\n    while True: print('x' * 999)", "output"),
    ],
)
def test_judge(isolation, source, reason):
    judgement = judge(source, "f", TESTS, seconds=0.5 if reason == "timeout" else 5, isolation=isolation)
    assert judgement.reason == reason and judgement.correct == (reason == "correct")


def test_time_limit_is_per_call_and_bounded_in_total(monkeypatch):
    slow = "import time\ndef f(n):\n    time.sleep(0.2)\n    return n * n + 1"
    assert judge(slow, "f", TESTS, seconds=0.7).reason == "timeout"
    limit = "import resource\ndef f():\n    return resource.getrlimit(resource.RLIMIT_CPU)[0]"
    most = int(60 * speed()) + 2
    assert judge(limit, "f", [([], most)], seconds=1.2, per_test=True).correct  # one process runs all tests
    monkeypatch.setattr("bessemer.addons.tasks.sandbox.TOTAL_SECONDS", 0.0)
    assert judge(slow, "f", TESTS * 5, seconds=0.3, per_test=True).reason == "timeout"  # 4 s, and 3 are allowed


BUSY = """
import time
def f(n):
    began = time.process_time()
    while time.process_time() - began < 0.3: pass
    return n
"""


@contextmanager
def crowded():
    """One core for this process and its children, and twelve others that want it all the time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cores)


@isolated
def test_the_same_program_has_the_same_time_on_a_crowded_machine(isolation, monkeypatch):
    """0.3 s of a core take 4 s here; the limit counts what the program computes, or sleeps."""
    monkeypatch.setattr("bessemer.addons.tasks.sandbox.process.speed", lambda: 1.0)
    source = BUSY.replace("def f", "print(input())\ndef f") + "f(1)"
    with crowded():
        assert judge(BUSY, "f", [([1], 1)], seconds=0.8, isolation=isolation).reason == "correct"
        assert sandbox.judge_program(source, [("1", "1")], seconds=0.8, isolation=isolation).reason == "correct"
        assert judge(BUSY, "f", [([1], 1)], seconds=0.2, isolation=isolation).reason == "timeout"
        sleeps = "import time\ndef f(n):\n    time.sleep(60)"
        assert judge(sleeps, "f", [([1], 1)], seconds=0.5, isolation=isolation).reason == "timeout"


@pytest.mark.parametrize(("machine", "reason"), [(0.5, "timeout"), (1.0, "timeout"), (4.0, "correct")])
def test_limits_match_those_of_the_reference_machine(machine, reason, monkeypatch):
    monkeypatch.setattr("bessemer.addons.tasks.sandbox.process.speed", lambda: machine)
    assert judge(BUSY, "f", [([1], 1)], seconds=0.15).reason == reason
    assert judge("import time\ndef f(n):\n    time.sleep(0.5)", "f", [([1], None)], seconds=0.15).reason == "timeout"


def test_values_of_every_kind_there_and_back():
    values = [None, True, 5, -1.5, "é\n\u2028\"'\\", [], [[1], "a"], {"a": [None], "": {}}, 10**400, "\ud800"]
    tests = [([value], value) for value in values]
    assert judge("def f(x): return x", "f", tests, seconds=5).correct
    assert judge("def f(*x): return x", "f", [([1, [2]], [1, [2]])], seconds=5).correct


def test_long_values_there_and_back():
    """As contests have them: a hundred thousand numbers to give back, as many edges to read, in the usual memory."""
    count = 100_000
    assert judge("def f(n): return list(range(n))", "f", [([count], list(range(count)))], seconds=9).correct
    edges = [[i, i + 1] for i in range(count)]
    assert judge("def f(a, *rest): return [len(a), *rest]", "f", [([edges, 1.5], [count, 1.5])], seconds=9).correct
    assert judge("def f(a): return len(a)", "f", [([[edges[0]] * count, (1,)][:1], count)], seconds=9).correct
    talk = "def f(n):\n    print('x' * 2000)\n    return n"
    assert judge(talk, "f", [([n], n) for n in range(100)], seconds=9).correct  # 2 KB a test


def test_integer_keys_are_the_text_that_json_makes_of_them():
    count = "def f(a):\n    return {n: a.count(n) for n in a}"
    assert judge(count, "f", [([[1, 1, 2]], {"1": 2, "2": 1})], seconds=5).correct
    assert judge("def f(): return {True: 1}", "f", [([], {"True": 1})], seconds=5).reason == "error"


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [(1, 1, True), (1, 1.0, True), (1, True, False), (True, 1, False), (0, False, False), (None, None, True),
     (None, False, False), (0, None, False), ("1", 1, False), (1, "1", False), ([1, 2], [1, 2], True),
     ([1], [1, 2], False), ([], {}, False), ((1,), [1], True), ({"a": 1}, {"a": 1}, True), ({"a": 1}, {"b": 1}, False),
     (0.1 + 0.2, 0.3, True), (0.3, 0.3001, False), (2.0, 2, True), (1.5, "1.5", False), (10**20, 1e20, True),
     (10**20 + 1, 1e20, False), (1, float("nan"), False), (1.0, float("inf"), False), ([True], [1], False),
     (1.5, 10**400, False), ([1.5], [10**400], False)],
)  # fmt: skip
def test_same(expected, actual, equal):
    assert same(expected, actual) is equal


def complaints(names, isolation):
    faults = []
    for name in names:
        began, before = time.monotonic(), below(os.getpid())
        judgement = judge(HOSTILE[name], "f", TESTS, seconds=0.4, memory_mb=128, isolation=isolation)
        wrong = {
            "paid": judgement.correct or judgement.passed >= len(TESTS),
            "slow": time.monotonic() - began >= 8,  # 0.4 s plus start and end, on a shared machine
            "left a child, dead or alive": not below(os.getpid()) <= before,
        }
        faults += [f"{name}: {fault}" for fault, is_so in wrong.items() if is_so]
    if not judge(RIGHT, "f", TESTS, seconds=5, isolation=isolation).correct:
        faults.append("the same process does not accept the right answer any more")
    return faults


@isolated
def test_hostile_code_is_unpaid_and_judged_quickly(isolation):
    """In four processes, as many of these programs only let their time run out."""
    shares = [list(HOSTILE)[first::4] for first in range(4)]
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        assert list(chain.from_iterable(pool.map(complaints, shares, repeat(isolation)))) == []


def test_there_are_enough_hostile_programs():
    assert len(HOSTILE) >= 90 and len(set(HOSTILE.values())) == len(HOSTILE)


# ---- no isolation, no code

WITHOUT = """
import os, sys
from bessemer.addons.tasks import sandbox
print(sandbox.level(), os.environ.get(sandbox.FORCE))
try:
    print(sandbox.judge("def f(n): return n", "f", [([1], 1)], seconds=5).reason)
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("forced", [None, "1", "yes"])
def test_without_isolation_code_does_not_run_unless_forced_by_name(forced):
    """Tried inside a namespace that refuses further namespaces, with bubblewrap off the path."""
    command = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    env = {name: value for name, value in os.environ.items() if name != sandbox.FORCE}
    env |= {"PATH": "/absent"} | ({sandbox.FORCE: forced} if forced else {})
    unshare = ["/usr/bin/unshare", "-Ur", "/bin/sh", "-c", command, sys.executable, WITHOUT]
    done = subprocess.run(unshare, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"none {forced}", done.stderr
    if forced == "1":
        assert lines[1] == "correct"
    else:
        assert lines[1].startswith("UserError code is not run here")
        assert "install bubblewrap" in lines[1] and f"set {sandbox.FORCE}=1" in lines[1]


def test_a_level_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/absent")
    with pytest.raises(UserError, match=r"cannot be started.*bwrap"):
        run("print(1)", isolation="bubblewrap")
    with pytest.raises(UserError, match=r"no level 'docker'.*bubblewrap, namespaces, none"):
        run("print(1)", isolation="docker")


HIDES = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def f(n):
    while True:
        if os.fork() == 0:
            began = time.process_time()
            while time.process_time() - began < 0.004: pass
            os._exit(0)
        time.sleep(0.001)
"""


@isolated
def test_unreaped_children_are_stopped_at_the_time_limit(isolation, monkeypatch):
    monkeypatch.setattr("bessemer.addons.tasks.sandbox.process.PATIENCE", 2.0)
    assert judge(HIDES, "f", [([1], 1)], seconds=0.5, isolation=isolation).reason in ("timeout", "error")
