"""What becomes of the MTP modules in RL and SFT, and what is measured of them and of the experts' loads."""

from types import SimpleNamespace

import pytest
import rl_stage
import torch
from train_config import train_config

from bessemer.data.batch import Batch
from bessemer.hf import deepseek
from bessemer.model.transformer import Transformer
from bessemer.rl import drafting
from bessemer.train import setup
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

DECAYING = (rl_stage.COIN, "weight_decay=0.5", "clip_norm=1000000.0", "kl.weight=0.0", "rollouts=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def stages(base, tmp_path_factory):
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "workers", lambda: Workers())
        for kind in ("frozen", "trained", "dropped"):
            made[kind] = rl_stage.Stage(base, tmp_path_factory.mktemp(kind) / "run", *DECAYING, f"mtp={kind}")
            made[kind].run()
    return made


def weights(folder):
    state = deepseek.load(folder / "model").state_dict()
    parts = ({name: x for name, x in state.items() if name.startswith("mtp.") == mtp} for mtp in (True, False))
    return [*parts]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_the_policy_is_the_same_whatever_becomes_of_the_modules(base, stages):
    """Frozen ones keep every bit though matrices decay; trained ones move and lower their loss by themselves."""
    (before, begun), found = weights(base), {kind: weights(stage.out) for kind, stage in stages.items()}
    assert before and equal(found["frozen"][0], before) and not found["dropped"][0]
    moved = {name for name, x in found["trained"][0].items() if not torch.equal(x, before[name])}
    assert moved >= {name for name in before if name.endswith("weight") and ".gate." not in name}
    for kind in ("trained", "dropped"):
        assert equal(found["frozen"][1], found[kind][1]), kind
    assert not equal(found["frozen"][1], begun)


def test_their_loss_on_the_samples_and_the_loads_are_metrics(stages):
    frozen, trained = (stages[kind].values("rl/mtp_1") for kind in ("frozen", "trained"))
    assert len(frozen) == len(trained) == 2 and trained[1] < trained[0] and trained[1] < frozen[1]
    assert not stages["dropped"].values("rl/mtp_1")
    for stage in stages.values():
        largest, layer = stage.values("rl/max_vio"), stage.values("moe/max_vio/1")
        assert len(largest) == len(layer) == 2 and all(a >= b > 0 for a, b in zip(largest, layer, strict=True))
    assert stages["trained"].values("moe/max_vio/mtp0") and not stages["frozen"].values("moe/max_vio/mtp0")


def with_modules(base, folder, n):
    """The base with n MTP modules."""
    cfg = deepseek.read_config(base / "model").model_copy(update={"n_mtp": n})
    Transformer(cfg).initialise(3).save(folder / "model", tokenizer_dir=base / "tokenizer")
    return folder


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_every_depth_is_measured(base, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(setup, "workers", lambda: Workers())
    stage = rl_stage.Stage(with_modules(base, tmp_path / "four", 4), tmp_path / "run", "rollouts=1", f"mtp={kind}")
    stage.run()
    assert all(len(stage.values(f"rl/mtp_{k}")) == 1 for k in range(1, 5))


def test_a_rank_whose_first_batch_is_a_filler_measures_the_next(base):
    run = Trainer(deepseek.load(base / "model"), next_token, None, *train_config(tokens=1, lr=0.1))
    batch = Batch(torch.arange(5, 29).view(2, 12), (torch.arange(12) > 0).float().expand(2, -1))
    drafts = drafting.Drafts(SimpleNamespace(trainer=run))
    alone = drafts.before_updates([batch])
    assert alone["rl/mtp_1"] > 1 and drafts.before_updates([batch.as_filler(), batch]) == alone


def test_training_modules_that_do_not_exist_is_reported(base, tmp_path):
    output = []
    settings = rl_stage.Stage(base, tmp_path / "run", "mtp=trained").recipe.stage("zero")
    model = deepseek.load(with_modules(base, tmp_path / "none", 0) / "model")
    assert drafting.prepare(model, settings, output.append) == 0.0
    assert any("warning" in line and "mtp" in line for line in output)
