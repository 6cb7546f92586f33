"""bench/gpu/first_hour.py without a GPU: a rehearsal with real processes, its page, and checks that fail."""

import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parents[2] / "bench" / "gpu"


def first_hour(out, *arguments):
    command = [sys.executable, str(GPU / "first_hour.py"), "--out", str(out), "--rehearse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bench(monkeypatch):
    """(first_hour, checks, fp8) as modules."""
    monkeypatch.syspath_prepend(str(GPU.parent))
    monkeypatch.syspath_prepend(str(GPU))
    import checks
    import first_hour as command
    import fp8

    return command, checks, fp8


@pytest.mark.timeout(600)
def test_a_rehearsal_resumes_and_reports_failing_checks(tmp_path):
    ended = first_hour(tmp_path, "--only", "values", "layer")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "first_hour.json").read_text())
    assert report["values"]["verdict"] == "good" and report["layer"]["verdict"] == "left out"
    assert max(report["values"]["figures"]["float32"].values()) < 1e-6 and report["values"]["rehearsed"]
    empty = report["values"]["figures"]["tokens_of_experts"]
    assert min(map(min, empty.values())) == 0, "some expert has no tokens"

    rerun = first_hour(tmp_path, "--only", "values", "layer").stdout
    assert "values: done before (good)" in rerun and "layer: Kernels" in rerun, "what was left out may be possible now"
    page = (tmp_path / "first_hour.html").read_text()
    assert "a rehearsal with a small network" in page and page.count("<tr>") == 3 and "Content-Security-Policy" in page


def test_checks_that_passed_on_the_same_cards_are_skipped(bench, tmp_path, monkeypatch):
    command = bench[0]
    verdicts = dict.fromkeys(("machine", "values", "layer", "decode"), "good")
    ran: list[str] = []

    def one(name, out, rehearse):
        ran.append(name)
        return {"verdict": verdicts[name], "says": "", "figures": {}, "seconds": 0.0}

    def start(cards, *arguments):
        ran.clear()
        monkeypatch.setattr(command, "cards", lambda: cards)
        monkeypatch.setattr(sys, "argv", ["first_hour.py", "--out", str(tmp_path), "--only", *verdicts, *arguments])
        command.main()
        return ran

    monkeypatch.setattr(command, "one", one)
    verdicts |= {"machine": "bad"}
    for cards in (command.NONE, "1 x V100"):
        with pytest.raises(SystemExit, match=f"1 bad: machine.*{tmp_path}/machine.log"):
            start(cards)
        assert ran == ["machine"], "the rest would compare this CPU with itself"
    verdicts |= {"machine": "good", "layer": "left out", "decode": "no bound"}
    assert start("1 x H100") == list(verdicts)
    assert start("1 x H100") == ["layer"]
    assert start("8 x H100") == list(verdicts)
    assert "8 x H100" in (tmp_path / "first_hour.html").read_text()
    assert start(command.NONE, "--rehearse") == list(verdicts)


def test_crashing_or_hanging_checks_are_reported_bad(bench, tmp_path, monkeypatch):
    command = bench[0]
    monkeypatch.setitem(command.CHECKS, "none", (lambda site: None, 60))
    crashed = command.one("none", tmp_path, rehearse=True)
    assert (
        crashed["verdict"] == "bad"
        and crashed["says"].startswith("ended with 2: ")
        and "invalid choice" in crashed["says"]
    )
    monkeypatch.setitem(command.CHECKS, "values", (command.CHECKS["values"][0], 0.2))
    assert command.one("values", tmp_path, rehearse=True)["says"].startswith("took more than 0 s")


STARTS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
subprocess.Popen([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
                 start_new_session=True)
time.sleep(60)
"""
CRASHES = f"""{STARTS.removesuffix("time.sleep(60)" + chr(10))}
import os, pathlib, signal
while len(pathlib.Path(__file__).with_name("fp8.log").read_text().split()) < 2:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGSEGV)
"""


def gone(pid):
    """Ended, or a zombie that nobody collects."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("stop", ["its limit", "a crash", signal.SIGTERM, signal.SIGHUP])
def test_processes_of_a_check_end_with_it(tmp_path, stop):
    """Neither its child nor one with a group of its own, as torchrun's ranks have."""
    (tmp_path / "checks.py").write_text(CRASHES if stop == "a crash" else STARTS)
    code = f"""import sys; sys.path[:0] = [{str(GPU)!r}, {str(GPU.parent)!r}]
import pathlib, signal, first_hour as command
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
command.__file__ = {str(tmp_path / "first_hour.py")!r}
command.CHECKS["fp8"] = command.CHECKS["fp8"][0], {6 if stop == "its limit" else 60}
command.stop_at_signals()
print(command.one("fp8", pathlib.Path({str(tmp_path)!r}), False)["says"])"""
    job, log = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True), tmp_path / "fp8.log"
    while not log.exists() or len(log.read_text().split()) < 2:
        assert job.poll() is None
        time.sleep(0.05)
    if isinstance(stop, signal.Signals):
        job.send_signal(stop)
    output = job.communicate(timeout=60)[0]
    assert ("took more than 6 s" in output) == (stop == "its limit")
    assert all(gone(int(pid)) for pid in log.read_text().split())


def facts_of(monkeypatch, module, status=1, **facts):
    """What checks.fp8 finds if fp8.py writes these facts and ends with this status, or never (None)."""

    def run(command, **settings):
        Path(command[command.index("--json") + 1]).write_text(json.dumps(facts))
        if status is None:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(module.subprocess, "run", run)
    return module.fp8(module.Site(False, torch.device("cuda")))


def test_fp8_check_reports_failures_when_timing_is_incomplete(bench, monkeypatch):
    checks = bench[1]
    line = {"call": "gemm", "shape": "s", "difference": 0.0}
    right, wrong = {"backend": checks.POINTERS, "good": True} | line, {"backend": "triton", "good": False} | line
    timed = [{"call": "gemm", "shape": "s", "backend": checks.POINTERS, "us": 100.0}]
    facts = facts_of(monkeypatch, checks, checks=[right, wrong], speed=timed)
    assert facts.verdict == "bad" and facts.says == "1 of 2 checks passed; wrong: gemm of triton"
    both = [*timed, {"call": "gemm", "shape": "s", "backend": "triton", "us": 80.0}]
    facts = facts_of(monkeypatch, checks, 0, checks=[right], speed=both)
    assert facts.verdict == "good" and "descriptors 1.25 times as fast" in facts.says
    for status, why in ((None, "fp8.py did not end in time"), (-9, "fp8.py ended with -9")):
        facts = facts_of(monkeypatch, checks, status, checks=[right])
        assert facts.verdict == "bad" and facts.says == f"1 of 1 checks passed; {why}" and facts.figures["checks"]


def test_fp8_checks_are_written_before_timing_and_survive_a_failing_kernel(bench, tmp_path, monkeypatch):
    fp8, path, cpu = bench[2], tmp_path / "fp8.json", torch.device("cpu")
    right = {"call": "gemm", "backend": "torch", "shape": "s", "difference": 0.0, "good": True}
    monkeypatch.setattr(fp8, "place", lambda interpret: cpu)
    monkeypatch.setattr(fp8, "checks", lambda device, small: [right])

    def start():
        monkeypatch.setattr(sys, "argv", ["fp8.py", "--json", str(path)])
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            fp8.main()
        return str(ended.value), json.loads(path.read_text())

    with monkeypatch.context() as patch:
        patch.setattr(fp8, "speed", lambda *_: (_ for _ in ()).throw(RuntimeError("no heuristic")))
        assert start()[1]["checks"] == [right]

    def breaks():
        raise RuntimeError("no heuristic for 4096x2112x7168")

    rates = {"bf16_tflops": 1.0, "copy_gb_per_s": 1.0}
    monkeypatch.setattr(fp8, "ceilings", lambda *_: rates)
    monkeypatch.setattr(fp8, "gemms", lambda device: iter(()))
    monkeypatch.setattr(
        fp8, "passes", lambda device: [("quantise", s, 0, 1, run, ()) for s, run in (("a", breaks), ("b", list))]
    )
    monkeypatch.setattr(fp8, "fast", lambda *_: ["triton"])
    monkeypatch.setattr(fp8, "seconds", lambda call, rounds, cold: (call(), 1.0)[1])
    output, facts = start()
    assert "1 call could not be timed" in output
    assert [line["shape"] for line in facts["speed"]] == ["b"]
    assert facts["failed"] == [
        {
            "call": "quantise",
            "backend": "triton",
            "shape": "a",
            "fault": "RuntimeError: no heuristic for 4096x2112x7168",
        }
    ]


def test_each_step_case_frees_the_previous_trainer(bench, monkeypatch):
    """Else the second and the third case need, and report, the memory of two."""
    checks, trainers = bench[1], []
    import fp8_step

    class Trainer:
        def update(self, batches):
            assert len(batches) == 1

    def trainer(*_):
        assert not any(alive() for alive in trainers)
        new = Trainer()
        trainers.append(weakref.ref(new))
        return new

    monkeypatch.setattr(fp8_step, "trainer", trainer)
    for name, value in {"get_device_capability": (9, 0), "get_device_name": "NVIDIA H100", "max_memory_allocated": 1,
                        "empty_cache": None, "reset_peak_memory_stats": None, "synchronize": None,
                        "set_sync_debug_mode": None}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    finding = checks.step(checks.Site(True, torch.device("cuda")))
    assert len(trainers) == 3 and finding.figures["FP8"]["waits"] == 0 and finding.figures["BF16"]["mfu"] > 0
