"""Reward models in use: what they read, scores independent of the batch, a fixed scale, every mistake named."""

import json
import math

import pytest
import torch

from bessemer.addons.r1 import preference
from bessemer.addons.r1.preference import FACTS, RewardModel, Scale, judged_ids, score_by
from bessemer.data.chat import EOS
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load_scorer
from bessemer.model.transformer import Scorer
from bessemer.train.collective import outputs_of

THOUGHT = "<think>\nthe code is 47\n</think>\n\nI cannot say it."
ITEMS = [
    (f"Make {n} from 3, 6, 7.", f"<think>\n{'so ' * (n % 7)}\n</think>\n\nit is {n} " + "yes " * n) for n in range(12)
]


@pytest.fixture
def directory(make_model, tokenizer, tmp_path):
    tokenizer.chat_style = "r1"
    tokenizer.save(tmp_path / "tokenizer")
    scale = Scale("harmless", -0.5, 1.5, tokenizer.fingerprint)
    network = Scorer.of(make_model(3), seed=2)
    network.save(tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer", files={FACTS: scale.to_json()})
    yield tmp_path / "model"
    tokenizer.chat_style = "zero"


def change(directory, **values):
    path = directory / FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("style", ["zero", "r1"])
def test_helpfulness_reads_the_summary_and_harmlessness_everything(tokenizer, style):
    before = tokenizer.chat_style
    tokenizer.chat_style = style
    try:
        helpful, harmless = (judged_ids(tokenizer, aim, "What?", THOUGHT) for aim in preference.AIMS)
        plain = judged_ids(tokenizer, "helpful", "What?", "I cannot say it.")
    finally:
        tokenizer.chat_style = before
    assert helpful == plain and helpful[-1] == harmless[-1] == tokenizer.special_id(EOS)
    assert "47" not in tokenizer.decode(helpful) and "I cannot say it." in tokenizer.decode(helpful)
    assert THOUGHT in tokenizer.decode(harmless) and "What?" in tokenizer.decode(harmless)


def test_an_answer_that_never_stops_thinking_has_no_summary(tokenizer):
    cut = judged_ids(tokenizer, "helpful", "What?", "<think>\nwell well")
    assert cut == judged_ids(tokenizer, "helpful", "What?", "")


def test_scores_do_not_depend_on_the_batch(directory, monkeypatch):
    model = RewardModel.load(directory)
    together = model.score(ITEMS)
    assert len(set(together)) == len(ITEMS)
    alone = [model.score([item])[0] for item in ITEMS]
    assert together == pytest.approx(alone, abs=1e-5)
    assert model.score(ITEMS[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    monkeypatch.setattr(preference, "BATCH_TOKENS", 100)
    assert model.score(ITEMS) == pytest.approx(together, abs=1e-5)
    assert model.score([]) == []


def test_a_score_matches_that_of_the_last_token_on_the_scale(directory):
    model = RewardModel.load(directory)
    prompt, answer = ITEMS[3]
    ids = judged_ids(model.tokenizer, "harmless", prompt, answer)
    with torch.no_grad():
        raw = load_scorer(directory)(torch.tensor([ids]))[0, -1].item()
    assert model.score([ITEMS[3]]) == pytest.approx([(raw + 0.5) / 2.0], abs=1e-5)
    assert model.aim == "harmless"


def test_scoring_leaves_the_network_in_its_mode_and_without_gradients(directory):
    network = load_scorer(directory).train()
    score_by(outputs_of(network), [[0, 5, 6, 1]], pad_id=2)
    assert network.training and all(parameter.grad is None for parameter in network.parameters())


def test_the_scale_puts_usual_answers_at_0_and_1():
    scale = Scale.learn("helpful", bad=[-2.0, 0.0], good=[1.0, 3.0], tokenizer="t")
    assert [scale(-1.0), scale(2.0), scale(5.0)] == [0.0, 1.0, 2.0]
    with pytest.raises(UserError, match="learnt nothing that RL could follow"):
        Scale.learn("helpful", bad=[1.0], good=[0.5], tokenizer="t")
    with pytest.raises(UserError, match="learnt nothing"):
        Scale.learn("helpful", bad=[0.0], good=[math.nan], tokenizer="t")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"aim": "funny"}, "no sensible scale or aim"),
        ({"zero": 2.0}, "no sensible scale"),
        ({"one": float("nan")}, "no sensible scale"),
        ({"one": float("inf")}, "no sensible scale"),
        ({"one": "1"}, "must hold aim, zero, one, tokenizer"),
        ({"more": 1}, "must hold aim"),
        ({"tokenizer": "other"}, "the tokenizer is not the one"),
    ],
)
def test_facts_are_checked(directory, values, complaint):
    change(directory, **values)
    with pytest.raises(UserError, match=complaint):
        RewardModel.load(directory)


def test_another_tokenizer_is_refused_by_name(directory):
    Tokenizer.train(["something else entirely, with other words"] * 20, 280).save(directory)
    with pytest.raises(UserError, match=r"model: the tokenizer"):
        RewardModel.load(directory)


def test_a_score_that_is_not_finite_is_an_error(directory):
    network = load_scorer(directory)
    network.score.weight.data.fill_(math.nan)
    model = RewardModel(outputs_of(network), load_tokenizer(directory), Scale.read(directory / FACTS))
    with pytest.raises(UserError, match=r"'Make 0 from 3, 6, 7.' as nan"):
        model.score(ITEMS)


def test_a_directory_without_facts_is_refused(directory):
    (directory / FACTS).unlink()
    with pytest.raises(UserError, match=FACTS):
        RewardModel.load(directory)
