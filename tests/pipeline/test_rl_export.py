"""What an RL stage exports: its samples as conversations, unchanged by a kill, and the prompt template, which later
stages inherit."""

import hashlib
import json
import tracemalloc
from types import SimpleNamespace

import pytest
import rl_stage
from completions import completion

from bessemer import tasks
from bessemer.addons.evals import contamination_search
from bessemer.addons.r1.reject import Reject
from bessemer.addons.r1.sample_export import SampleExport
from bessemer.addons.r1.tables import RejectConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.data.chat import ZERO_PREAMBLE, question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.eval import scoring
from bessemer.pipeline.stages.eval import Eval
from bessemer.rl import rollout
from bessemer.rl.rollout import Rollout, ScoredSample
from bessemer.runs.context import Interrupted

COIN = rl_stage.COIN
ALL = 'hooks=[{name="export-samples", which="all"}]'
COUNTDOWN = tasks.get("countdown")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def stage(base, folder, *changes):
    return rl_stage.Stage(base, folder, COIN, "max_new_tokens=60", *changes)


def conversations(stage):
    return [json.loads(line)["messages"] for line in (stage.out / "samples.jsonl").read_text().splitlines()]


def test_all_ended_samples_are_left_in_order_and_training_is_the_same(base, tmp_path, monkeypatch):
    seen, sampled = [], SampleExport.sampled

    def noted(self, number, exporting):
        seen.extend(row for group in exporting.groups for row in group)
        return sampled(self, number, exporting)

    monkeypatch.setattr(SampleExport, "sampled", noted)
    exporting = stage(base, tmp_path / "all", ALL)
    exporting.run()
    ended = [row for row in seen if row.completion.finish_reason == "stop"]
    assert 0 < len(ended) < len(seen) == 24, "a test of both kinds"
    expected = [
        [{"role": "user", "content": row.problem.prompt}, {"role": "assistant", "content": row.answer}] for row in ended
    ]
    assert conversations(exporting) == expected
    plain = stage(base, tmp_path / "plain")
    plain.run()
    assert rl_stage.differences(plain.leaves(), exporting.leaves()) == [] and not (plain.out / "samples.jsonl").exists()
    right = stage(base, tmp_path / "right", 'hooks=["export-samples"]')
    right.run()
    assert conversations(right) == [], "this policy solves nothing"


def test_stopped_and_gone_on_with_it_leaves_the_same(base, tmp_path, monkeypatch):
    uninterrupted = stage(base, tmp_path / "whole", ALL)
    uninterrupted.run()
    made = stage(base, tmp_path / "stopped", ALL)
    loop = made.loop()
    update, calls = loop.trainer.update, []

    def stopped(batches):
        calls.append(0)
        if len(calls) == 4:  # in the middle of the second rollout, whose file already exists
            raise Interrupted("here")
        return update(batches)

    loop.trainer.update = stopped
    with pytest.raises(Interrupted):
        loop.run()
    assert not (made.out / "samples.jsonl").exists()
    made.run()
    assert (
        conversations(made) == conversations(uninterrupted)
        and rl_stage.differences(made.leaves(), uninterrupted.leaves()) == []
    )


def test_the_template_of_table_1_is_asked_in_and_exported(base, tmp_path):
    exporting = stage(base, tmp_path / "preamble", 'prompt_template="r1-zero"', "rollouts=1", "max_new_tokens=4")
    loop = exporting.run()
    problem = loop.generator.tasks[0].problem("train", 0)
    asked = f"{ZERO_PREAMBLE}\nUser: {problem.prompt}\nAssistant:"
    exported = Tokenizer.load(exporting.out / "model")
    assert loop.tokenizer.decode(loop.generator.encode(problem)) == asked
    assert exported.decode(question_ids(exported, problem.prompt)) == asked
    plain = stage(base, tmp_path / "plain", "rollouts=1", "max_new_tokens=4")
    plain.run()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (plain.out / "model" / name).read_bytes() == (base / "model" / name).read_bytes()


class Asked(Exception):
    """Carries the prompt out of a stage."""


@pytest.mark.parametrize(("template", "preamble"), [("model", ""), ("zero", ""), ("r1-zero", f"{ZERO_PREAMBLE}\n")])
def test_rejection_and_evaluation_ask_in_the_template_they_name(base, tmp_path, monkeypatch, template, preamble):
    def ask(engine, problems_or_encode, *rest, **options):
        encode = rest[0] if callable(rest[0]) else problems_or_encode
        raise Asked(engine.tokenizer.decode(encode(COUNTDOWN.problem("train", 0))))

    monkeypatch.setattr(rollout, "sample", ask)
    monkeypatch.setattr(scoring, "evaluate", ask)
    monkeypatch.setattr(contamination_search, "search", lambda config, ctx, problems: {})
    ctx = stage(base, tmp_path / "stage").loop().ctx
    ctx.inputs = {"pretrain": base}
    names = {"tasks": ["countdown"], "prompt_template": template}
    for kind, config in (
        (Reject, RejectConfig(kind="reject", **names)),
        (Eval, EvalConfig(kind="eval", models=["pretrain"], searched_words=0, **names)),
    ):
        with pytest.raises(Asked) as caught:
            kind().run(config, ctx)
        assert str(caught.value) == f"{preamble}User: {COUNTDOWN.problem('train', 0).prompt}\nAssistant:"


def test_a_long_run_s_samples_are_never_in_memory_together(tmp_path):
    """650 rollouts of 8,192 answers are many times a machine's memory; here 40 MB with 4 MB."""
    ctx = SimpleNamespace(leads=True, state=tmp_path)
    export = SampleExport(SimpleNamespace(settings=SimpleNamespace(rollouts=20), ctx=ctx), which="all")
    text = "".join(chr(97 + n % 26) for n in range(2000))
    verdict = tasks.Verdict(True, True, "correct", None)
    expected = hashlib.sha256()
    tracemalloc.start()
    for number in range(20):
        rows = [
            ScoredSample(tasks.Problem("p", f"{number}/{n}", "en"), [1], completion([5], text), verdict)
            for n in range(1000)
        ]
        export.sampled(number, Rollout([rows], 1, 9, 0))
        expected.update((tmp_path / "left" / f"{number:06d}.jsonl").read_bytes())
    export.finish(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with (tmp_path / "samples.jsonl").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == expected.digest()
    assert (tmp_path / "samples.jsonl").stat().st_size > 40e6 and peak < 8e6
