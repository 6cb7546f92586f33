"""Samples of an RL stage as conversations: whose they are, and that a kill changes nothing."""

import json

import pytest
import rl_stage

from bessemer.rl.monitor import SampleExport
from bessemer.runs.context import Interrupted

COIN = 'reward="random"'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def stage(base, folder, *changes):
    return rl_stage.Stage(base, folder, COIN, "max_new_tokens=60", *changes)


def conversations(made):
    return [json.loads(line)["messages"] for line in (made.out / "samples.jsonl").read_text().splitlines()]


def test_all_ended_samples_are_left_in_order_and_training_is_the_same(base, tmp_path, monkeypatch):
    seen, add = [], SampleExport.add

    def noted(self, number, groups):
        seen.extend(row for group in groups for row in group)
        add(self, number, groups)

    monkeypatch.setattr(SampleExport, "add", noted)
    made = stage(base, tmp_path / "all", 'export_samples="all"')
    made.run()
    ended = [row for row in seen if row.completion.finish_reason == "stop"]
    assert 0 < len(ended) < len(seen) == 24, "a test of both kinds"
    expected = [
        [{"role": "user", "content": row.problem.prompt}, {"role": "assistant", "content": row.answer}] for row in ended
    ]
    assert conversations(made) == expected
    plain = stage(base, tmp_path / "plain")
    plain.run()
    assert plain.leaves() == made.leaves() and not (plain.out / "samples.jsonl").exists()
    right = stage(base, tmp_path / "right", 'export_samples="correct"')
    right.run()
    assert conversations(right) == [], "this policy solves nothing"


def test_stopped_and_gone_on_with_it_leaves_the_same(base, tmp_path, monkeypatch):
    whole = stage(base, tmp_path / "whole", 'export_samples="all"')
    whole.run()
    made = stage(base, tmp_path / "stopped", 'export_samples="all"')
    loop = made.loop()
    update, calls = loop.trainer.update, []

    def stopped(batches):
        calls.append(0)
        if len(calls) == 4:  # in the middle of the second rollout, whose file is written
            raise Interrupted("here")
        return update(batches)

    loop.trainer.update = stopped
    with pytest.raises(Interrupted):
        loop.run()
    assert not (made.out / "samples.jsonl").exists()
    made.run()
    assert conversations(made) == conversations(whole) and made.leaves() == whole.leaves()
