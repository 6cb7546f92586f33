"""What the real stage's updates use: every sample of a rollout once, and a reference as old as the recipe says
(R1-Nature, Methods)."""

from collections import Counter

import pytest
import rl_stage
import torch

from bessemer.hf import deepseek
from bessemer.model.transformer import Transformer
from bessemer.train.trainer import Trainer

UPDATES, ROLLOUTS, EVERY = 4, 2, 3
RATES = [0.01 + 0.001 * step for step in range(UPDATES * ROLLOUTS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base, batches of every update, weights before every update and after the last one, rollouts, metrics of every
    update)."""
    base = rl_stage.write_base(tmp_path_factory.mktemp("base"))
    stage = rl_stage.Stage(
        base, tmp_path_factory.mktemp("run") / "run", rl_stage.COIN, f"rollouts={ROLLOUTS}", "temperature=0.9",
        "samples=4", f"updates_per_rollout={UPDATES}", f"kl.reference_every={EVERY}", "kl.weight=0.05",
        'lr=[["0", 0.01], ["10", 0.02]]',
    )  # fmt: skip
    loop = stage.loop()
    batches, weights, rollouts, metrics = [], [], [], []
    update, sample = Trainer.update, loop.generator.rollout

    def watched(trainer, given):
        batches.append(given)
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        values = update(trainer, given)
        metrics.append(values)
        return values

    def taken(*where):
        rollouts.append(sample(*where))
        return rollouts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", watched)
        patch.setattr(loop.generator, "rollout", taken)
        loop.run()
    assert len(batches) == UPDATES * ROLLOUTS == loop.trainer.step
    return base, batches, weights, rollouts, metrics


def logprobs(weights, base, batch):
    """log pi of every trained token at the stage's temperature, computed row by row in float64."""
    model = Transformer(deepseek.load(base / "model").cfg).eval()
    model.load_state_dict(weights)
    outputs = []
    for tokens, weight in zip(batch.tokens_BT, batch.loss_BT, strict=True):
        with torch.no_grad():
            logits = model(tokens[None, : int(weight.nonzero().max()) + 1])[0].double() / 0.9
        at = weight.nonzero().squeeze(1)
        outputs.append(logits.log_softmax(-1)[at - 1, tokens[at]])
    return torch.cat(outputs)


def test_the_reference_is_the_policy_of_the_last_refresh(trained):
    base, batches, weights, _, metrics = trained
    kl = [values["train/kl"] for values in metrics]
    for step, given in enumerate(batches):
        for batch in given:
            seen = batch.extras["ref_logp_BT"][batch.loss_BT > 0].double()
            expected = logprobs(weights[step - step % EVERY], base, batch)
            assert (seen - expected).abs().max() < 1e-4, step
            for other in {*range(0, step + 1, EVERY)} - {step - step % EVERY}:
                apart = (logprobs(weights[other], base, batch) - expected).abs().max()
                assert apart > 1e-2, "an older refresh would be seen"
        if step % EVERY:
            assert kl[step] > 1e-5, "the policy has moved away from it"
        else:
            assert kl[step] == pytest.approx(0, abs=1e-7), "it has just been copied"


def test_the_rate_follows_optimizer_steps_and_every_rollout_is_the_newest_policy_s(trained):
    _, _, _, rollouts, metrics = trained
    assert [values["train/lr"] for values in metrics] == pytest.approx(RATES)
    assert [rollout.step for rollout in rollouts] == [0, UPDATES]


def test_every_sample_is_used_once_in_a_rollout(trained):
    """The mini-batches have equal sizes, and each sample keeps its own advantage."""
    _, batches, _, rollouts, _ = trained
    for number, rollout in enumerate(rollouts):
        assert len(rollout.groups) == rollout.n_problems == 4
        mine, sizes = Counter(), []
        for given in batches[number * UPDATES : (number + 1) * UPDATES]:
            sizes.append(sum(batch.n_rows for batch in given))
            for batch in given:
                for tokens, weight, advantage in zip(
                    batch.tokens_BT, batch.loss_BT, batch.extras["advantage_BT"], strict=True
                ):
                    end = int(weight.nonzero().max()) + 1
                    mine[tuple(tokens[:end].tolist()), advantage[end - 1].item()] += 1
        rows = [row for group in rollout.groups for row in group]
        expected = Counter(
            ((*row.prompt_tokens, *row.completion.tokens), torch.tensor(row.advantage).item()) for row in rows
        )
        assert mine == expected and max(expected.values()) == 1
        assert sizes == [len(rows) // UPDATES] * UPDATES
