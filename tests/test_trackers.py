"""Trackers mirror metrics.jsonl: real libraries, read back by their own readers; kills, new attempts, failures."""

import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from filelock import FileLock

from bessemer.addons.watch import trackers
from bessemer.errors import UserError
from bessemer.runs.metrics import Metrics

RECIPE = 'name = "mirrored"\nseed = 1\n\n[[stage]]\nkind = "corpus"\nparts = { a = "fables-en" }\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "run"
    root.mkdir()
    (root / "recipe.toml").write_text(RECIPE)
    return root


def write(root, stage, steps, scale=1.0):
    metrics = Metrics(root / "metrics.jsonl")
    for step in steps:
        values = {"train/loss": scale * step, "moe/load/3": [0.5, 0.5], "odd": float("nan"), "flag": True}
        metrics.write(stage, step, step * 10, values)
    metrics.close()


def tensorboard(root):
    """{series: [(step, value)]}"""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(root / "trackers" / "tensorboard")).Reload()
    (run,) = multiplexer.Runs()
    return {
        name: [(event.step, event.value) for event in multiplexer.Scalars(run, name)]
        for name in multiplexer.Runs()[run]["scalars"]
    }


def mlflow(root):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root.absolute() / 'trackers' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("bessemer").experiment_id])
    assert run.info.run_name == "mirrored"
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def records(data: bytes) -> Iterator[bytes]:
    """Records in LevelDB's log format, which wandb uses for offline runs: 32 KiB blocks after a header of 7 bytes. A
    record is whole (1) or split into first (2), middle (3) and last (4), each after checksum, length and kind."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:
            at += room  # padding
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb(root):
    from wandb.proto import wandb_internal_pb2

    points: dict[str, list] = {}
    for file in sorted(root.glob("trackers/wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {
                logged.key or "/".join(logged.nested_key): json.loads(logged.value_json)
                for logged in record.history.item
            }
            for name, value in row.items():
                if name.endswith("/train/loss"):
                    points.setdefault(name, []).append((row[name.removesuffix("train/loss") + "step"], value))
    return points


def trackio(root):
    points: dict[str, list] = {}
    for file in (root.parent / "trackio").glob("**/bessemer.db"):
        for (text,) in sqlite3.connect(file).execute("SELECT metrics FROM metrics ORDER BY id"):
            row = json.loads(text)
            for name, value in row.items():
                if name.endswith("/train/loss"):
                    points.setdefault(name, []).append((row[name.removesuffix("train/loss") + "step"], value))
    return points


def send(root, name):
    """trackio and wandb get a new process per call: the one reads its environment once, at import, and the other names
    an offline run by the second."""
    if name not in ("trackio", "wandb"):
        assert trackers.track(root, [name]) == []
        return
    code = "import pathlib, sys; from bessemer.addons.watch.trackers import track; "
    code += "assert track(pathlib.Path(sys.argv[1]), sys.argv[2:]) == []"
    subprocess.run([sys.executable, "-c", code, root, name], capture_output=True, timeout=120, check=True)


READERS = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb, "trackio": trackio}


@pytest.mark.parametrize("name", READERS)
def test_curves_continue_after_a_kill_and_a_new_attempt_has_its_own(run, name):
    pytest.importorskip(trackers.TRACKERS[name][0])
    write(run, "base", range(1, 6))
    send(run, name)
    metrics = Metrics(run / "metrics.jsonl")  # killed; the last checkpoint was at step 3
    metrics.rewind("base", 3)
    metrics.close()
    send(run, name)  # nothing new to send
    write(run, "base", range(4, 8))
    write(run, "rl", range(1, 3))
    send(run, name)
    metrics = Metrics(run / "metrics.jsonl")  # another learning rate: the stage was set aside and starts over
    metrics.rewind("rl", -1)
    metrics.close()
    time.sleep(0.002)
    write(run, "rl", range(1, 3), scale=10.0)
    send(run, name)
    curves = {series: points for series, points in READERS[name](run).items() if series.endswith("loss")}
    assert curves == {
        "base/train/loss": [(step, float(step)) for step in range(1, 8)],
        "rl/train/loss": [(1, 1.0), (2, 2.0)],
        "rl.2/train/loss": [(1, 10.0), (2, 20.0)],
    }


def test_mlflow_gets_every_name(run):
    """Names of tasks hold paths and addresses, of which MLflow refuses much."""
    pytest.importorskip("mlflow")
    tasks = ["countdown", "jsonl:hf://a/b#test", "jsonl:/d/a+b.jsonl", "jsonl:/d/a(b.jsonl", "env:ws://host:1/", "漢"]
    tasks += ["jsonl:/d/../a", "jsonl:/d/./a", "jsonl:/a", "x" * 300, "x" * 301, "a/.."]
    metrics = Metrics(run / "metrics.jsonl")
    metrics.write("eval", 1, 10, {f"{task}/pass@1": float(n) for n, task in enumerate(tasks)})
    metrics.write("eval", 2, 10, {task: float(n) for n, task in enumerate(tasks)})
    metrics.close()
    assert trackers.track(run, ["mlflow"]) == []
    series = mlflow(run)
    assert len(series) == 2 * len(tasks) and series["eval/countdown/pass at 1"] == [(1, 0.0)]


def test_tracking_follows_a_run_to_its_end(run):
    """Lines written just before the end arrive, sent by a process that the run's Ctrl-C does not reach."""
    with trackers.mirrored(run, ["tensorboard"]):
        write(run, "base", range(1, 3))
        deadline = time.monotonic() + 60
        while not (run / "trackers.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match="to its trackers already"):
            trackers.track(run, ["tensorboard"])
        write(run, "base", range(3, 9))
    assert tensorboard(run)["base/train/loss"] == [(step, float(step)) for step in range(1, 9)]


def test_after_an_immediate_restart(run, capfd):
    """The process beside the killed run may still be sending."""
    (run / "trackers").mkdir()
    with FileLock(run / "trackers" / "lock") as lock, trackers.mirrored(run, ["tensorboard"]):
        deadline = time.monotonic() + 60
        while not (run / "trackers" / "log.txt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        lock.release()
        write(run, "base", range(1, 4))
    assert len(tensorboard(run)["base/train/loss"]) == 3 and not capfd.readouterr().err
    with FileLock(run / "trackers" / "lock"), trackers.mirrored(run, ["tensorboard"]):
        pass
    assert "to its trackers already" in capfd.readouterr().err


def test_a_tracker_that_fails_stops_nothing_and_gets_the_rest_later(run, monkeypatch, capfd):
    write(run, "base", range(1, 4))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with trackers.mirrored(run, ["mlflow", "tensorboard"]):
            pass
    out, err = capfd.readouterr()
    assert "tracker mlflow stopped:" in err and "bessemer track" in err and err.count("\n") == 1 and not out
    assert len(tensorboard(run)["base/train/loss"]) == 3
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert trackers.track(run, ["mlflow", "tensorboard"]) == []
    assert len(mlflow(run)["base/train/loss"]) == len(tensorboard(run)["base/train/loss"]) == 3


def test_an_unreadable_or_unwritable_record_is_a_one_line_error(run, capfd):
    write(run, "base", range(1, 4))
    (run / "trackers.json").mkdir()
    with trackers.mirrored(run, ["tensorboard"]):
        pass
    err = capfd.readouterr().err
    assert err.startswith("trackers: ") and "trackers.json" in err and err.endswith("; the run continues\n")
    assert not (run / "trackers" / "log.txt").read_text()


def test_a_tracker_that_hangs_is_left_behind(run, monkeypatch, capfd):
    monkeypatch.setattr(trackers, "PATIENCE", 3.0)
    write(run, "base", range(1, 4))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts the connection and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with trackers.mirrored(run, ["mlflow"]):
            pass
        assert time.monotonic() - began < 30
    assert "not done after 3 s; bessemer track" in capfd.readouterr().err


def test_a_killed_run_takes_its_mirror_with_it(run):
    code = (
        "import sys, time; from pathlib import Path; from bessemer.addons.watch import trackers\n"
        f"with trackers.mirrored(Path({str(run)!r}), ['tensorboard']): print('in', flush=True); time.sleep(100)"
    )
    write(run, "base", range(1, 4))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while True:  # the mirror sends what there is, then ends and frees the lock
        try:
            assert time.monotonic() < deadline
            assert (run / "trackers.json").exists()
            assert trackers.track(run, ["tensorboard"]) == []
            break
        except (UserError, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    assert len(tensorboard(run)["base/train/loss"]) == 3


def test_unsupported_requests_are_refused(run, monkeypatch):
    write(run, "base", range(1, 4))
    (run / "trackers.json").write_text("{")
    with pytest.raises(UserError, match=r"trackers\.json is damaged; delete it"):
        trackers.track(run, ["tensorboard"])
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        trackers.track(run.parent, ["tensorboard"])
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("no_such_package", trackers.WandB))
    with pytest.raises(UserError, match=r"pip install 'bessemer\[trackers\]'"):
        trackers.check_installed(["tensorboard", "wandb"])


def test_a_recipe_names_its_trackers(tmp_path):
    from bessemer.config.recipe import Recipe
    from bessemer.pipeline import runner

    recipe = Recipe.parse(RECIPE, ['trackers=["wandv"]'])
    with pytest.raises(UserError, match='no tracker "wandv"; did you mean "wandb"'):
        runner.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
