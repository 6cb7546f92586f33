"""PPO's critic on many ranks against that of one process: values, advantages, updates, and its place in the policy's
checkpoint."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from completions import completion
from ranks import on_ranks
from rl_parts import to_batches
from test_executor import CFG

from bessemer.addons.distributed import zero1
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader
from bessemer.addons.distributed.collective import RankCollective
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.whole import GatheredModel, gather_into
from bessemer.addons.r1.critic import Critic
from bessemer.config.rl import RLConfig
from bessemer.model.transformer import Scorer, Transformer
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.plan import TrainingPlan
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

PAD, LR = 2, 3e-3
SETTINGS = RLConfig(
    kind="rl", name="zero", tasks=["arithmetic"], advantage={"name": "critic", "lr": LR, "gae_lambda": 0.9}, lr=1e-3,
    micro_tokens=30, save_seconds=1000,
)  # fmt: skip


def groups(number, n=5):
    """A random rollout: three samples for each prompt."""
    draw = torch.Generator().manual_seed(number)

    def ids(least, most):
        length = int(torch.randint(least, most, (), generator=draw))
        return torch.randint(3, CFG.vocab_size, (length,), generator=draw).tolist()

    def one(prompt):
        answer = ids(1, 12)
        logp = (-4 - torch.rand(len(answer), generator=draw)).tolist()
        layers = CFG.n_layers - CFG.n_dense_layers
        routing = torch.rand(len(prompt + answer) - 1, layers, CFG.n_routed_experts, generator=draw)
        routing = routing.topk(CFG.n_activated_experts).indices.short()
        sample = completion(answer, "", logp, "stop", len(prompt), routing=routing)
        reward = float(answer[0] % 2) + 0.1 * len(answer)
        return ScoredSample(Problem("p", "", "en"), prompt, sample, Verdict(True, True, "", None), reward)

    return [[one(prompt) for _ in range(3)] for prompt in (ids(2, 8) for _ in range(n))]


class Run:
    """Policy and critic, whole or only this rank's part."""

    def __init__(self, folder, schedule=None, layout=None, dtype=torch.float32):
        network, among = Transformer(CFG).initialise(1), None
        if layout is not None:
            zero1.BUCKET, zero1.FILLING = 1 << 14, 0.25  # this process is the rank's own
            among = RankCollective(ModelShard(network, Mesh(layout, CFG), schedule))
        self.policy = Trainer(
            network, GRPO(kl=0.0), None, SETTINGS, TrainingPlan(workers=Workers(), compute_dtype=dtype), folder,
            model_config=CFG.model_dump(), collective=among,
        )  # fmt: skip
        self.whole = Whole(network) if among is None else GatheredModel(self.policy)
        layout = SimpleNamespace(recompute=())
        loop = SimpleNamespace(
            trainer=self.policy, policy=self.whole, settings=SETTINGS, tokenizer=SimpleNamespace(pad_id=PAD),
            ctx=SimpleNamespace(recipe=SimpleNamespace(layout=layout)),
        )  # fmt: skip
        self.critic = Critic(loop, **SETTINGS.advantage.settings)
        self.resumed = self.policy.start()

    def rollout(self, number):
        """Two updates on one rollout; returns everything that must equal one process."""
        rows = groups(number)
        self.critic.assign(rows)
        flat = [row for group in rows for row in group]
        for part in (flat[::2], flat[1::2]):
            batches = to_batches(part, PAD, SETTINGS.micro_tokens, "sequence", self.policy.collective.n_pipelines)
            own = list(self.policy.collective.mine(batches))
            self.critic.before_step(own)
            self.policy.update(own)
        actual = {name: [row.per_token[name] for row in flat] for name in ("value", "return")}
        actual["advantage"] = [row.advantage for row in flat]
        return actual, self.critic.metrics()

    def state(self):
        """The critic's master weights and moments as in the checkpoint."""
        self.policy.finish()
        reader = CheckpointReader(self.policy.state_dir / f"step-{self.policy.step:08d}")
        names = [name for name in sorted(reader.locations) if name.startswith("extras/critic/")]
        return {name: value.float().numpy() for name, value in reader.read(names).items()}


def two_rollouts(folder, *where):
    """The run, its results, and a copy of its folder as it was between the two rollouts."""
    run = Run(folder, *where)
    assert not run.resumed
    first = run.rollout(1)
    run.policy.save()
    run.policy.finish()
    if not where or dist.get_rank() == 0:
        shutil.copytree(folder, folder.parent / "between")
    if where:
        dist.barrier()
    second = run.rollout(2)
    run.policy.save()
    return run, (first, second)


def on_a_rank(rank, folder, alone, schedule, layout):
    """Two rollouts; the second again after a kill, and again from a checkpoint of one process."""
    run, results = two_rollouts(folder / "run", schedule, layout)
    ended = run.state()
    again = Run(folder / "between", schedule, layout)
    assert again.resumed and again.policy.step == again.critic.trainer.step == 2
    repeated = again.rollout(2)
    again.policy.save()
    moved = Run(alone, schedule, layout)
    assert moved.resumed and moved.critic.trainer.optimizer.steps == 2
    scorer = Scorer(run.critic.trainer.collective.mesh.cfg)
    gather_into(run.critic.trainer.collective.shard, scorer)
    return {
        "both": results, "ended": ended, "repeated": repeated, "again": again.state(), "moved": moved.rollout(2),
        "whole": {name: value.numpy() for name, value in scorer.state_dict().items()},
        "held": sum(group.master.numel() for group in run.critic.trainer.optimizer.groups),
        "counted": [float(gate.load_E.sum()) for gate in run.critic.trainer.gates.values()],
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return folder, *two_rollouts(folder / "run")


def near(actual, expected):
    """The results of two rollouts agree up to rounding; the second's values were learnt from the first."""
    for (own, metrics), (on_rank, known) in zip(actual, expected, strict=True):
        for name, of_rows in on_rank.items():
            for value, of_row in zip(own[name], of_rows, strict=True):
                assert value == pytest.approx(of_row, rel=1e-3, abs=2e-4), name
        share = metrics["critic/clip_share"]  # on few tokens, rounding decides which error is the larger
        assert metrics == pytest.approx(known | {"critic/clip_share": share}, rel=1e-3, abs=1e-5)
        assert share == pytest.approx(known["critic/clip_share"], abs=0.03)


LAYOUTS = [("dualpipe", Layout(2, 1, 1)), ("zbv", Layout(2, 1, 2))]


@pytest.mark.parametrize(("schedule", "layout"), LAYOUTS, ids=str)
def test_critic_on_ranks_matches_one_process(alone, tmp_path, schedule, layout):
    """Values, returns, advantages and metrics; weights within a tenth of AdamW's steps, first moments closer. Bit for
    bit after a kill, and either can resume from the other's checkpoint."""
    folder, run, expected = alone
    ranks = on_ranks(layout.world, on_a_rank, tmp_path, folder / "between", schedule, layout)
    assert max(map(abs, (value for row in expected[1][0]["value"] for value in row))) > 0.01
    weights, n_held = run.state(), 0
    for actual in ranks:
        near(actual["both"], expected)
        near([actual["moved"]], expected[1:])
        assert actual["both"][1] == actual["repeated"], "the same after a kill"
        assert actual["ended"].keys() == actual["again"].keys() == weights.keys()
        assert all((value == actual["again"][name]).all() for name, value in actual["ended"].items())
        for name, value in weights.items():
            own, label = torch.from_numpy(actual["ended"][name]), name.removeprefix("extras/critic/")
            if label.startswith("model/"):
                assert (own - torch.from_numpy(value)).abs().max() < 0.1 * LR, name
            elif label.startswith("optimizer/m/"):
                assert (own - torch.from_numpy(value)).norm() <= 1e-3 * own.norm() + 1e-9, name
        for name, value in actual["whole"].items():
            if ".experts." not in name:
                assert (actual["ended"][f"extras/critic/model/{name}"] == value).all(), name
        assert not any(actual["counted"]), "values count no expert's load"
        n_held += actual["held"]
    n = sum(value.numel() for value in run.critic.trainer.model.parameters())
    copies = 2 if schedule == "dualpipe" else 1  # DualPipe holds every stage twice
    assert n <= n_held / copies < n + 100_000, "every rank has a share"
    shutil.rmtree(tmp_path / "between" / "step-00000004")
    moved = Run(tmp_path / "between")
    assert moved.resumed and moved.critic.trainer.optimizer.steps == 2
    near([moved.rollout(2)], expected[1:])


def test_bfloat16_checkpoint_stores_critic_masters(tmp_path):
    run = Run(tmp_path, dtype=torch.bfloat16)
    run.rollout(1)
    run.policy.save()
    run.policy.finish()
    resumed = Run(tmp_path, dtype=torch.bfloat16)
    masters = run.critic.trainer.optimizer.masters()
    assert masters["layers.0.attn.wo.weight"].bfloat16().float().ne(masters["layers.0.attn.wo.weight"]).any()
    actual = resumed.critic.trainer.optimizer.masters()
    assert all(torch.equal(actual[name], value) for name, value in masters.items())
    rounded = resumed.critic.trainer.model.state_dict()
    assert all(torch.equal(rounded[n], x) for n, x in run.critic.trainer.model.state_dict().items())
