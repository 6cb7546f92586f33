"""Samples stay on the rank that generated them: the run is that of one process, and no rank holds another's tokens."""

import json
import pickle
from array import array

import pytest
import rl_stage
import stages_run
import torch
import torch.distributed as dist
from ranks import on_ranks

from bessemer.addons.distributed.apart import Carrier, Elsewhere, held_by, rank_of, stays
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.tasks.environment import Environment
from bessemer.config.recipe import Recipe
from bessemer.engine.generation import Completion
from bessemer.rl.loop import Loop
from bessemer.rl.rollout import Packing, ScoredSample
from bessemer.runs.context import StageContext, StopFlag
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress
from bessemer.tasks import get
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.runtime import Runtime

CHANGES = ("prompts_per_rollout=4", "samples=4", "rollouts=2", 'reward="format"', "micro_tokens=90")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def trained(rank, base, folder, changes):
    """(metrics, for every rollout the rows that are held when it is scored, as (number of tokens, whether its arrays
    are here, whether its text is), rows sent to other ranks)."""
    ranks, runtime = None, Runtime()
    if dist.is_initialized():
        ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    recipe = Recipe.load(folder / "small.toml", changes)
    if ranks is not None:
        runtime = OnRanks(ranks, recipe.layout, lambda text: None)
    lines = folder / f"metrics-{rank}.jsonl"
    ctx = StageContext(
        "zero", folder / "zero", {}, base, recipe, folder, StageMetrics(Metrics(lines), "zero"),
        RunProgress({}).begin("zero"), StopFlag(), runtime=runtime,
    )  # fmt: skip
    loop = Loop(recipe.stage("zero"), ctx, {})
    held, score = [], loop.generator.score

    def scored(*arguments):
        groups = score(*arguments)
        rows = [row.completion for group in groups for row in group]
        held.append([(len(one.tokens), not isinstance(one.tokens, Elsewhere), bool(one.text)) for one in rows])
        return groups

    loop.generator.score = scored
    sent, gather = [], ranks and ranks.gather

    def gathered(value, *arguments):
        sent.append(len(value))
        return gather(value, *arguments)

    if ranks is not None:
        ranks.gather = gathered
    loop.run()
    return [json.loads(line)["values"] for line in lines.read_text().splitlines()], held, sum(sent)


def in_folder(folder, *changes):
    stages_run.write_recipe(folder)
    (folder / "zero").mkdir()
    return [f"zero.{change}" for change in (*rl_stage.SMALL, *CHANGES)] + list(changes)


def measured_alike(one, other):
    """What is measured on the first micro-batch of every pipeline; two ranks of one pipeline have one process's."""
    for name in ("rl/mtp_1", "rl/routing_disagreement"):
        assert [line[name] for line in one if name in line] == pytest.approx(
            [line[name] for line in other if name in line], rel=2e-3, abs=5e-3
        ), name


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            other = ("seconds", "time/", "memory", "per_second", "rl/sampler", "gpu/", "mtp", "disagreement")
            if not any(word in name for word in other):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return trained(0, base, folder, in_folder(folder))


@pytest.mark.parametrize("layout", ["layout.dp=2", "layout.pp=2", "layout.ep=2", "layout.cp=2"])
def test_two_ranks_train_like_one_and_hold_only_their_own_samples(base, alone, tmp_path, layout):
    values, whole, _ = alone
    results = on_ranks(2, trained, base, tmp_path, in_folder(tmp_path, layout))
    close(results[0][0], values)
    if layout in ("layout.pp=2", "layout.cp=2"):
        measured_alike(results[0][0], values)
    for number, rows in enumerate(whole):
        one, other = (held[number] for _, held, _ in results)
        assert [n for n, *_ in one] == [n for n, *_ in other] == [n for n, *_ in rows]
        assert all(a != b for (_, a, _), (_, b, _) in zip(one, other, strict=True)), "each is on one rank"
        assert all(here or not text for _, here, text in [*one, *other])
        assert 0 < sum(here for _, here, _ in one) < len(rows)
    rows, moved = sum(map(len, whole)), sum(sent for *_, sent in results)
    assert 0 < moved <= rows and (moved == rows or layout not in ("layout.pp=2", "layout.cp=2")), (
        "each goes once to each that trains it"
    )


STALE = (f"zero.{rl_stage.AHEAD_CORRECTED}", f"zero.{rl_stage.COIN}", "zero.lr=3e-3", "zero.rollouts=3")


@pytest.fixture(scope="module")
def corrected(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrected")
    return trained(0, base, folder, in_folder(folder, *STALE))[0]


@pytest.mark.parametrize("layout", ["layout.pp=2", "layout.ep=2", "layout.cp=2"])
def test_importance_weights_come_from_the_shards(base, corrected, tmp_path, layout):
    """Of a policy that is two steps further than the sampler's, with the sampler's experts."""
    results = on_ranks(2, trained, base, tmp_path, in_folder(tmp_path, layout, *STALE))
    weights = [line["rl/correction_weight"] for line in corrected if "rl/correction_weight" in line]
    assert len(weights) == 3 and max(abs(weight - 1) for weight in weights) > 1e-3, weights
    close(results[0][0], corrected)
    if layout == "layout.pp=2":  # rows that ranks split are packed in other widths
        measured_alike(results[0][0], corrected)
    assert max(line.get("rl/routing_disagreement", 0) for line in corrected) > 0.01


ALONE = ("zero.samples=6", "zero.prompts_per_rollout=1", "zero.updates_per_rollout=6")


@pytest.mark.parametrize(
    ("layout", "paid"),
    [("layout.dp=2", 'reward="format"'), *((f"layout.{kind}=2", rl_stage.COIN) for kind in ("dp", "ep", "pp"))],
    ids=["apart", "dp", "ep", "pp"],
)
def test_pipelines_without_samples_take_part(base, tmp_path, layout, paid):
    """Updates of one sample on two ranks; what is paid decides whether samples stay on their ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    changes = (*ALONE, f"zero.{paid}", "zero.kl.weight=0.1")
    values, _, _ = trained(0, base, one, in_folder(one, *changes))
    results = on_ranks(2, trained, base, two, in_folder(two, layout, *changes))
    close(results[0][0], values)
    if paid == rl_stage.COIN:
        assert max(line.get("rl/grad_norm", 0) for line in values) > 0, "it trained"


@pytest.mark.parametrize("change", [f"zero.{rl_stage.COIN}", f"zero.{rl_stage.AHEAD}", 'zero.hooks=["export-samples"]'])
def test_what_reads_samples_elsewhere_gets_them_all(base, tmp_path, change):
    results = on_ranks(2, trained, base, tmp_path, in_folder(tmp_path, "layout.dp=2", change))
    assert all(is_here for _, held, _ in results for rows in held for _, is_here, _ in rows)
    assert all(sent == 0 for *_, sent in results)


@pytest.mark.parametrize(
    ("changes", "stay"),
    [((), True), (('reward=["accuracy", "language"]',), True),
     (('reward=["accuracy", {name="language", scope="reply"}]',), False),
     (('advantage="critic"',), False), (('advantage="batch"',), True),
     (('rollout.engine="ray"',), False), ((rl_stage.COIN,), False), (('hooks=["export-samples"]',), False),
     (('hooks=["routing-replay"]',), True),
     ((rl_stage.AHEAD,), False)],
)  # fmt: skip
def test_samples_stay_only_where_nothing_but_the_trainer_reads_them(tmp_path, changes, stay):
    """What an option reads elsewhere would be an empty text."""
    stages_run.write_recipe(tmp_path)
    recipe = Recipe.load(tmp_path / "small.toml", [f"zero.{change}" for change in (*rl_stage.SMALL, *changes)])
    settings = recipe.stage("zero")
    countdown = get("countdown")
    talk = {"name": "talk", "domain": "words", "__module__": type(countdown).__module__}
    others = [type("Talk", (Environment,), talk)(), type("Mine", (type(countdown),), {"__module__": "mine"})()]
    assert stays(settings, [countdown]) == stay
    assert not any(stays(settings, [countdown, other]) for other in others)


class Dealt:
    """What a carrier reads of a collective: the parts of each pipeline, None for a filler; rank r is in r % n."""

    def __init__(self, numbers, rank):
        self.numbers, self.n_pipelines, self.pipeline = numbers, len(numbers), rank % len(numbers)

    def numbers_by_pipeline(self, count):
        return self.numbers


def carried(rank, n, numbers):
    """(rows sent by this rank, the texts, the micro-batches) after 8 rows, each made by rank i % n, were carried."""
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, n, torch.device("cpu"))
    rows, sent, gather = [], 0, ranks.gather

    def counting(value, *arguments):
        nonlocal sent
        sent += len(value)
        return gather(value, *arguments)

    ranks.gather = counting
    for number in range(8):
        one = held_by(number % n, 6, "stop", 2)
        if number % n == rank:
            one = Completion(array("i", [number] * 6), "text", array("f", [0.0] * 6), "stop", 2)
        problem, verdict = Problem(str(number), "q", "en", {}), Verdict(True, True, "", None)
        rows.append(ScoredSample(problem, [1, 2], one, verdict, language=1.0, begun=""))
    parts = [[rows[:2], [rows[2]]], [[row] for row in rows[3:6]], [rows[6:]]]  # two rows of two samples
    batches = Carrier(Dealt(numbers, rank), ranks).batches(rows, parts, Packing(100, 0).batch)
    held = [(batch.tokens_BT.flatten()[2::8].tolist(), batch.filler) for batch in batches]
    return sent, [row.completion.text for row in rows], held


def test_a_row_goes_once_to_each_rank_that_trains_it():
    """A rank passes on no row that it was sent, and nothing replaces its own."""
    for rank, (sent, texts, batches) in enumerate(on_ranks(3, carried, 3, [[0, 1, 2]])):
        own = [number % 3 == rank for number in range(8)]
        assert sent == 2 * sum(own) and [first for first, _ in batches] == [[0, 1, 2, 0], [3, 4, 5], [6, 7]]
        assert texts == ["text" if mine else "" for mine in own]


def test_a_filler_has_a_row_that_another_rank_made():
    one, other = on_ranks(2, carried, 2, [[0, 1], [2, None]])
    assert one[2] == [([0, 1, 2, 0], False), ([3, 4, 5], False)]
    assert other[2] == [([6, 7], False), ([0, 1], True)]


def test_what_a_rank_keeps_of_another_s_samples_does_not_grow_with_them():
    """8,192 samples of 10,000 tokens."""
    long = [held_by(1, 10_000 + n % 7, "stop", 100) for n in range(8192)]
    assert sum(len(one.tokens) for one in long) > 8192 * 10_000
    assert len(pickle.dumps(long)) < 150 * len(long), "0.02 bytes a token"
    assert [rank_of(one, 0) for one in long[:3]] == [1, 1, 1]
    with pytest.raises(TypeError):
        long[0].tokens[0]


LONG_ROWS = (
    "zero.loss=gspo", "zero.top_p=0.9", "zero.normalise=constant", "zero.kl.unbiased=true", "zero.mtp=trained",
    'zero.hooks=["routing-replay", {name="correction", form="sequence-truncate"}]',
)  # fmt: skip
PPO = ("zero.advantage=critic", "zero.updates_per_rollout=1")


@pytest.mark.parametrize("changes", [LONG_ROWS, PPO], ids=["gspo", "critic"])
def test_rows_that_two_ranks_split_give_the_updates_of_one(base, tmp_path, changes):
    """A loss over whole answers, whose tokens lie on both ranks, with the reference, a sampling mask, the sampler's
    experts, importance weights and MTP modules; and a critic."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    values, _, _ = trained(0, base, one, in_folder(one, *changes))
    results = on_ranks(2, trained, base, two, in_folder(two, "layout.cp=2", *changes))
    close(results[0][0], values)
    exact = (
        "rl/grad_norm",
        "rl/kl",
        "rl/entropy",
        "rl/correction_weight",
        "rl/mtp_1",
        "critic/loss",
        "critic/grad_norm",
    )
    first, actual = (next(line for line in lines if "rl/grad_norm" in line) for lines in (values, results[0][0]))
    for name in set(exact) & first.keys():
        assert actual[name] == pytest.approx(first[name], rel=1e-4), name
