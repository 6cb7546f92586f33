"""Real processes, real signals: a run that was killed ends like one that was not."""

import itertools
import json
import signal

import pytest


def stage_lines(toy, stage):
    path = toy.out / "metrics.jsonl"
    return path.read_text().count(f'"stage":"{stage}"') if path.exists() else 0


@pytest.fixture
def undisturbed(other_toy):
    assert other_toy.run()[0] == 0
    return other_toy.result()


def test_kill_9_again_and_again(toy, undisturbed):
    toy.write(pause=0.02)
    for stage, steps in (("first", 3), ("first", 13), ("second", 8)):
        process = toy.start()
        toy.wait_for(lambda stage=stage, steps=steps: stage_lines(toy, stage) >= steps)
        process.kill()
        process.communicate()
    # what a kill in the middle of a write leaves
    with open(toy.out / "metrics.jsonl", "ab") as file:
        file.write(b'{"time":1,"stage":"second","st')
    toy.write(pause=0.0)
    status, stages, output = toy.run()
    assert status == 0 and f"the last attempt (process {process.pid}) was killed" in output, output
    assert stages == {"first": "skipped", "second": "done", "compare": "done"}
    result = toy.result()
    result.pop("recipe.toml"), undisturbed.pop("recipe.toml")
    assert result == undisturbed


def test_a_stop_signal_saves_and_says_how_to_continue(toy, undisturbed):
    toy.write(pause=0.05)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = toy.start()
        before = stage_lines(toy, "first")
        toy.wait_for(lambda before=before: stage_lines(toy, "first") >= before + 2)
        process.send_signal(number)
        _, output = process.communicate(timeout=20)
        assert process.returncode == 130
        assert 'stopped in stage "first"; nothing is lost; continue with: bessemer run' in output
        assert f"--out {toy.out}" in output
    checkpoint = (toy.out / "01-first" / "state" / "checkpoint.json").read_text()
    assert f'"step": {stage_lines(toy, "first")}' in checkpoint  # no finished step was lost
    assert toy.run()[0] == 0
    result = toy.result()
    result.pop("recipe.toml"), undisturbed.pop("recipe.toml")
    assert result == undisturbed


def test_the_second_signal_kills(toy):
    toy.write(pause=30)
    process = toy.start()
    toy.wait_for(lambda: (toy.out / "01-first" / "stage.json").exists())
    process.send_signal(signal.SIGTERM)
    lines = itertools.takewhile(lambda line: "once more to stop at once" not in line, process.stderr)
    assert len(list(lines)) < 10 and process.poll() is None  # a few lines so far, and the process is alive
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.communicate()


def test_two_runs_do_not_share_a_directory(toy):
    toy.write(pause=2.0)
    process = toy.start()
    toy.wait_for(lambda: stage_lines(toy, "first") >= 1)
    status, _, output = toy.run()
    assert status == 2 and f"in use by another run (process {process.pid})" in output
    process.kill()
    process.communicate()
    toy.write()
    assert toy.run()[0] == 0  # the lock died with its holder


def test_wall_seconds_add_up_over_kills(toy):
    toy.write(pause=0.15, steps=30)
    process = toy.start("first")
    toy.wait_for(lambda: (toy.out / "01-first" / "wall.json").exists())
    process.kill()
    process.communicate()
    before, worked = json.loads((toy.out / "01-first" / "wall.json").read_text()).values()
    assert before > 1.0 and worked > 0
    toy.write(steps=30)
    toy.run("first")
    done = json.loads((toy.out / "01-first" / "done.json").read_text())
    assert done["seconds"] > before and done["cpu_seconds"] >= worked
