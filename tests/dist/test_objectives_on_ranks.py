"""Reward models and distillation on many ranks against one process: steps, scores, exports, kills, and checkpoints that
either can resume from."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hf_cases import made
from ranks import on_ranks
from test_critic_on_ranks import PAD, groups
from test_executor import CFG
from train_config import train_config

from bessemer.addons.distributed import zero1
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.r1 import preference_rows
from bessemer.addons.r1.objectives import OnPolicyDistillation, pairwise, pointwise
from bessemer.addons.r1.preference import score_by
from bessemer.addons.r1.preference_rows import BAD, GOOD
from bessemer.config.recipe import LayoutConfig
from bessemer.hf import deepseek
from bessemer.model.transformer import Scorer, Transformer
from bessemer.rl.rollout import Packing
from bessemer.train.runtime import Runtime

T, LR, ROWS, STEPS, SEED = 40, 3e-3, 6, 2, 5
KINDS = {"pairs": (preference_rows.PairRows, pairwise), "labels": (preference_rows.LabelRows, pointwise)}
TEACHERS = ("larger", "shallow", "llama")


def text(number, length):
    return [0, *(3 + (number * 11 + i * (1 + number % 5)) % 90 for i in range(length - 2)), 1]


TEXTS = [text(number, 4 + number * 5 % 17) for number in range(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A student; teachers: a larger one, one that two pipeline ranks cannot cut into four slices, and one of another
    family; judged texts as rows."""
    folder = tmp_path_factory.mktemp("base")
    for name, changes in {"student": {}, "larger": {"dim": 48, "n_layers": 5}, "shallow": {"n_layers": 1}}.items():
        cfg = CFG.model_copy(update={"init_std": 0.2, **changes})
        Transformer(cfg).initialise(len(name)).save(folder / name)
    made("llama").save_pretrained(folder / "llama")
    pairs = ([(good, GOOD), (bad, BAD)] for good, bad in zip(TEXTS[::2], TEXTS[1::2], strict=True))
    labels = ([(ids, GOOD if number % 3 else BAD)] for number, ids in enumerate(TEXTS))
    for name, units in (("pairs", pairs), ("labels", labels)):
        preference_rows.build(units, T, PAD, folder / name)
    return folder


class Run:
    """A training run, whole or only this rank's part; `values` holds those of every step."""

    said, runtime = (), Runtime()

    def placed(self, network, schedule, layout):
        """The whole network, or this rank's part of it."""
        if layout is None:
            return network
        shard = network if isinstance(network, ModelShard) else ModelShard(network, Mesh(layout, CFG), schedule)
        ranks = Ranks(dist.distributed_c10d._get_default_store(), dist.get_rank(), layout.world, shard.device)
        self.said = []
        self.runtime = OnRanks(ranks, LayoutConfig(), self.said.append)
        return self.runtime.held(shard)

    def __init__(self, network, objective, rows, folder, **settings):
        self.values = []
        self.trainer = self.runtime.trainer(
            network, objective, rows, *train_config(lr=LR, clip=1.0, micro_rows=1, **settings), folder,
            model_config=network.cfg.model_dump(),
        )  # fmt: skip

    def train(self, steps):
        """Trains up to this step and saves a checkpoint."""
        self.trainer.start()
        while self.trainer.step < steps:
            self.values.append(self.trainer.update(self.batches()))
        self.trainer.save()
        self.trainer.finish()

    def figures(self):
        """The values without those that depend on time or layout."""
        left_out = ("train/tokens_per_second", "moe/sent_bytes/node")
        return [{name: value for name, value in one.items() if name not in left_out} for one in self.values]


class Rewards(Run):
    def __init__(self, kind, base, folder, schedule=None, layout=None):
        rows_of, objective = KINDS[kind]
        if layout is None:
            network = Scorer.of(deepseek.load(base / "student"), SEED)
        else:
            mesh, cpu = Mesh(layout, CFG.model_copy(update={"n_mtp": 0})), torch.device("cpu")
            network = ModelShard.read(base / "student", mesh, schedule, cpu, kind=Scorer, new_head=SEED, mtp=False)
        network = self.placed(network, schedule, layout)
        rows = preference_rows.load(base / kind, rows_of, 0).batch
        super().__init__(network, objective, rows, folder, batch_rows=ROWS, terms={"balance_alpha": 1e-2}, tokens=1)

    def batches(self):
        return self.trainer.on_device.micro_batches()

    def scores(self):
        return score_by(self.trainer.collective.outputs, TEXTS, PAD)


class Distilled(Run):
    """With three teachers."""

    def __init__(self, kind, base, folder, schedule=None, layout=None):
        network = self.placed(deepseek.load(base / "student"), schedule, layout)
        self.teachers = self.runtime.frozen({name: base / name for name in TEACHERS}, network)
        super().__init__(network, OnPolicyDistillation(self.teachers.networks, 0.9), None, folder)

    def batches(self):
        rows = [row for group in groups(self.trainer.step, 4) for row in group]
        for row in rows:
            row.completion = replace(row.completion, routing=None)
        packing = Packing(30, PAD, n_pipelines=self.trainer.collective.n_pipelines)
        batches = [
            replace(packing.batch(part, part), teacher=number)
            for number in range(len(TEACHERS))
            for part in packing.parts(rows[number::3])
        ]
        return self.teachers.read(self.trainer, batches)

    def scores(self):
        return []


RUNS = {"pairs": Rewards, "labels": Rewards, "distilled": Distilled}


def trained(kind, base, folder, *where):
    """The run; a copy of its folder half-way is left behind."""
    half = RUNS[kind](kind, base, folder, *where)
    half.train(1)
    if not where or dist.get_rank() == 0:
        shutil.copytree(folder, folder.parent / f"{kind}-half")
    if where:
        dist.barrier()
    run = RUNS[kind](kind, base, folder, *where)
    run.train(STEPS)
    run.values = half.values + run.values
    return run


def on_a_rank(rank, base, folder, alone, kinds, schedule, layout):
    zero1.BUCKET, zero1.FILLING = 1 << 14, 0.25
    actual = {}
    for kind in kinds:
        run = trained(kind, base, folder / kind, schedule, layout)
        resumed = RUNS[kind](kind, base, folder / f"{kind}-half", schedule, layout)
        resumed.train(STEPS)
        run.runtime.save(run.trainer, folder / f"{kind}-model", None)
        resumed.runtime.save(resumed.trainer, folder / f"{kind}-again", None)
        moved = folder / f"{kind}-moved"
        if rank == 0:
            shutil.copytree(alone / f"{kind}-half", moved)
        dist.barrier()
        moved_run = RUNS[kind](kind, base, moved, schedule, layout)
        moved_run.train(STEPS)
        actual[kind] = run.figures(), resumed.figures(), moved_run.figures(), run.scores(), [*run.said]
    return actual


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    runs = {kind: trained(kind, base, folder / kind) for kind in RUNS}
    for kind, run in runs.items():
        run.runtime.save(run.trainer, folder / f"{kind}-model", None)
    return folder, runs


def near(actual, expected):
    assert len(actual) == len(expected) > 0
    for own, on_rank in zip(actual, expected, strict=True):
        for name in on_rank.keys() & {"train/loss", "train/grad_norm", "train/accuracy", "train/margin"}:
            assert own[name] == pytest.approx(on_rank[name], rel=1e-4), name


LAYOUTS = [("labels", "dualpipe", Layout(2, 2, 1)), ("pairs", "zbv", Layout(2, 1, 2))]


@pytest.mark.parametrize(("judged", "schedule", "layout"), LAYOUTS, ids=str)
def test_steps_match_those_of_one_process(base, alone, tmp_path, judged, schedule, layout):
    """Losses and gradient norms to rounding, exported weights within a tenth of AdamW's steps, a second half repeated
    bit for bit after a kill, and checkpoints that do not depend on the layout."""
    (home, expected), kinds = alone, (judged, "distilled")
    for actual in on_ranks(layout.world, on_a_rank, base, tmp_path, home, kinds, schedule, layout):
        for kind, (values, resumed, moved, scores, message) in actual.items():
            near(values, expected[kind].figures())
            assert resumed == values[1:], "the same after a kill"
            near(moved, expected[kind].figures()[1:])
            assert scores == pytest.approx(expected[kind].scores(), rel=1e-3, abs=1e-3)
            complete = [text.split('"')[1] for text in message]
            assert complete == (["shallow", "llama"] if schedule == "zbv" else ["llama"]) * (kind == "distilled")
    for kind in kinds:
        stored, own, resumed = (
            deepseek.load(path / f"{kind}-{name}", kind=Scorer if kind in KINDS else Transformer).state_dict()
            for path, name in ((home, "model"), (tmp_path, "model"), (tmp_path, "again"))
        )
        assert all(torch.equal(own[name], value) for name, value in resumed.items())
        for name, value in stored.items():
            if "bias_E" not in name:
                assert (own[name] - value).abs().max() < 0.1 * LR, (kind, name)
        shutil.rmtree(tmp_path / f"{kind}-half" / f"step-{STEPS:08d}")
        restored = RUNS[kind](kind, base, tmp_path / f"{kind}-half")
        restored.train(STEPS)
        near(restored.figures(), expected[kind].figures()[1:])
