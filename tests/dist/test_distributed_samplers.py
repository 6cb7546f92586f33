"""Samples that several ranks generate together equal those of one process, in order."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from bessemer.addons.distributed.dealing import DealtEngine, Helper, rows_of_batch
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.rank0_sampler import Rank0Sampler, TrainedPolicy
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.tasks.environment import Environment, Observation
from bessemer.config.recipe import LayoutConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.answers import played
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl.sampler import LocalSampler
from bessemer.runs.context import Interrupted, StageContext, StopFlag
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.collective import Collective
from bessemer.train.runtime import Whole

ASKED = {"samples": 3, "seeds": [5, 6, 7], "max_new_tokens": 6, "temperature": 1.0, "batch_rows": 2}
PROMPTS = ["one fox", "two", "a crow and a ring"]


def engine(seed=1):
    tokenizer = Tokenizer.train(["one fox saw a crow", "two rings and a crow", "an old man lost a ring"] * 20, 300)
    shape = {"vocab_size": tokenizer.vocab_size, "dim": 32, "inter_dim": 48, "moe_inter_dim": 16, "n_heads": 2}
    return Engine(Transformer(preset("tiny", **shape)).initialise(seed).eval(), tokenizer)


def runtime_of(ranks):
    return OnRanks(ranks, LayoutConfig(), print)


def texts(groups):
    return [[completion.text for completion in group] for group in groups]


def generated(rank, kind):
    ranks, calls = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu")), []
    sampled = engine()
    if kind == "sharded":
        sampler = LocalSampler(sampled, lambda: calls.append(rank), runtime_of(ranks))
    else:
        own = LocalSampler(sampled, lambda: calls.append(rank)) if rank == 0 else None
        trained = TrainedPolicy(Whole(sampled.model), Collective(), lambda: 0, runtime_of(ranks))
        sampler = Rank0Sampler(own, sampled.tokenizer, trained)
    return texts(sampler.policy()(PROMPTS, **ASKED).take()), calls


@pytest.mark.parametrize(("samples", "rows", "n", "expected"), [
    (1024, 256, 8, 128), (1024, 256, 4, 256), (1024, 256, 3, 171), (9, 2, 2, 2), (3, 64, 8, 1), (2048, 512, 4, 512),
])  # fmt: skip
def test_every_rank_gets_equally_many_batches(samples, rows, n, expected):
    assert rows_of_batch(samples, rows, n) == expected <= rows
    assert samples < n or -(-samples // expected) / n > 0.8


@pytest.mark.parametrize("kind", ["sharded", "rank0"])
def test_all_ranks_get_the_samples_of_one_process(kind):
    expected = texts(engine().generate(PROMPTS, **ASKED))
    assert len({text for group in expected for text in group}) > 4
    for rank, (actual, calls) in enumerate(on_ranks(2, generated, kind)):
        assert actual == expected and calls == [rank] * (rank == 0 or kind == "sharded"), "refreshed once"


class Talk(Environment):
    """Two turns with one message in between; the task is its own episode."""

    name, domain, max_turns, resets = "talk", "words", 2, 0
    start = [{"role": "user", "content": "one fox"}]  # noqa: RUF012

    def make(self, split, index, seed, language, phrasing):
        return Problem(f"talk/{index}", "one fox", language)

    def reset(self, problem, seed):
        Talk.resets += 1
        return self

    def step(self, turn):
        return Observation([{"role": "user", "content": f"a ring, {len(turn.text)}"}])

    def verdict(self, text):
        return Verdict(len(text) % 2 == 0, True, "correct", text)

    def close(self):
        pass


def episodes(rank, ranks=None):
    """(tokens and verdicts of two problems' samples, number of environments reset here)."""
    if ranks:
        ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
        sampler, once = (
            LocalSampler(engine(), lambda: None, runtime_of(ranks)),
            lambda make: ranks.broadcast(make, "episodes"),
        )
    else:
        sampler, once = LocalSampler(engine(), lambda: None), lambda make: make()
    problems = [(Talk(), Talk().problem("train", n)) for n in range(2)]
    _, groups = played(
        sampler, problems, None, samples=3, seeds=[5, 6], cap=20, context=200, once=once, temperature=1.0, top_p=1.0,
        batch_rows=2, stop_ids=range(20, 200),
    )  # fmt: skip
    return [[(entry.completion.tokens, entry.verdict) for entry in group] for group in groups], Talk.resets


def test_episodes_match_those_of_one_process_and_rank_0_alone_has_environments():
    expected, _ = episodes(0)
    Talk.resets = 0
    actual = on_ranks(2, episodes, True)
    assert [entry for entry, _ in actual] == [expected, expected] and [resets for _, resets in actual] == [6, 0]
    assert max(len(tokens) for group in expected for tokens, _ in group) > 20, "of two turns and what lies between"


def changed(target, step):
    """Replaces this model's weights by another's."""
    with torch.no_grad():
        for own, other in zip(target.model.parameters(), engine(9 + step).model.parameters(), strict=True):
            own.copy_(other)


def ordered(rank, folder):
    """Two calls of a model and a judge in turn, calls of a student in training, and one of what it began as."""
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    if rank:
        helper, loaded = Helper(ranks), []
        for order in ranks.follow():
            helper.take_part(order)
            loaded.append(id(helper._loaded[order["role"]].engine))
        return loaded
    own, judging, student, step = engine(), engine(2), engine(), 0
    plain, judge = DealtEngine(own, folder / "1", ranks), DealtEngine(judging, folder / "2", ranks, "judge")
    trained, actual = DealtEngine(student, folder / "3", ranks, "student", lambda: step), []
    prompts = [own.tokenizer.encode(text) for text in PROMPTS]
    for _ in range(2):
        actual += [texts(entry.generate(prompts, **ASKED)) for entry in (plain, judge)]
    for _ in range(2):
        changed(student, step)
        step += 1
        actual += [texts(trained.generate(prompts, **ASKED)) for _ in range(2)]
    actual.append(texts(DealtEngine(own, folder / "3", ranks, "student").generate(prompts, **ASKED)))
    ranks.order({"end": True})
    return actual


def test_waiting_ranks_generate_what_rank_0_orders(tmp_path):
    """The others load every model once, follow the weights of a model that changes, and load what it began as again."""
    expected = {}
    for seed in (1, 2, 9, 10):
        own = engine(seed)
        expected[seed] = texts(own.generate([own.tokenizer.encode(text) for text in PROMPTS], **ASKED))
        for name in {1: "13", 2: "2"}.get(seed, ""):
            own.model.save(tmp_path / name)
            own.tokenizer.save(tmp_path / name)
    actual, loaded = on_ranks(2, ordered, tmp_path)
    assert (
        actual == [expected[seed] for seed in (1, 2, 1, 2, 9, 9, 10, 10, 1)]
        and len({*map(str, expected.values())}) == 4
    )
    assert loaded[:2] == loaded[2:4] and len(set(loaded[:8])) == 3


def led_by_rank_0(rank, folder):
    """Parts of a stage that rank 0 runs with the other as helper: one succeeds, one fails, and one is stopped."""
    ranks, sampled = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu")), []
    ctx = StageContext("part", folder, {}, None, None, folder, None, None, StopFlag(), runtime=runtime_of(ranks))

    def make(alone):
        own = engine()
        prompts = [own.tokenizer.encode(text) for text in PROMPTS]
        sampled.append(texts(DealtEngine(own, folder, alone.runtime.ranks).generate(prompts, **ASKED)))

    def fail(alone):
        raise UserError("the judge does not answer")

    ctx.led(make)
    with pytest.raises(UserError, match="the judge does not answer"):
        ctx.led(fail)
    with pytest.raises(Interrupted):
        ctx.led(StageContext.interrupt)
    return sampled


def test_errors_and_stops_of_rank_0_reach_all_ranks(tmp_path):
    own = engine()
    own.model.save(tmp_path)
    own.tokenizer.save(tmp_path)
    expected = texts(own.generate([own.tokenizer.encode(text) for text in PROMPTS], **ASKED))
    assert on_ranks(2, led_by_rank_0, tmp_path) == [[expected], []]
