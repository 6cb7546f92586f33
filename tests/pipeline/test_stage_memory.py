"""What a dry run counts for an RL stage is what the stage holds."""

import pytest
import rl_stage

from bessemer.addons.plan import stage_memory
from bessemer.data.tokenizer import Tokenizer
from bessemer.hf import deepseek  # noqa: F401 (it writes models)
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl.reference import Reference
from bessemer.train import setup
from bessemer.workers import side_by_side


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Large enough that the filling of flat vectors does not count, with an embedding that counts."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train(rl_stage.TEXTS, 300)
    tokenizer.save(folder / "tokenizer")
    model = Transformer(preset("tiny", vocab_size=20_000)).initialise(3)
    model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder


@pytest.mark.parametrize("changes", [(), ("kl.weight=0.0",), ("optimizer=muon",), ("advantage=critic",)])
def test_every_tensor_of_a_real_stage_is_counted(base, tmp_path, monkeypatch, changes):
    """A small network in float32 on two workers, after a rollout: weights, gradients, moments, copies, to 5 %."""
    monkeypatch.setattr(setup, "workers", lambda: side_by_side(2))
    stage = rl_stage.Stage(base, tmp_path / "run", "rollouts=1", *changes)
    loop = stage.run()
    recipe = stage.recipe.model_copy(update={"model": {"preset": "tiny", **loop.policy.model.cfg.model_dump()}})
    need = stage_memory.of_stages(recipe)["zero"].bytes

    def held(trainer):
        groups = trainer.optimizer.groups
        return {
            "weights": sum(group.compute.nbytes for group in groups),
            "gradients": sum(2 * group.grad.nbytes for group in groups),  # one for each worker
            "moments": sum(tensor.nbytes for group in groups for tensor in group.moments.values()),
        }

    references = [component for component in loop.components if isinstance(component, Reference)]
    assert len(references) == ("kl.weight=0.0" not in changes)
    reference = sum(tensor.nbytes for one in references for tensor in one.copy.model.state_dict().values())
    assert len(loop.trainer.companions) == ("advantage=critic" in changes)
    critic = sum(sum(held(critic).values()) for critic in loop.trainer.companions.values())
    for kind, size in (held(loop.trainer) | {"reference": reference, "critic": critic}).items():
        assert need.get(kind, 0) == pytest.approx(size, rel=0.05), (kind, need)
