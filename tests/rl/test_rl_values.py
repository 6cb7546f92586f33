"""GAE against its definition, the clipped value loss by hand, and a critic that learns the right values."""

import pytest
import torch
from completions import completion
from rl_parts import to_batches
from train_config import train_config

from bessemer.addons.r1 import critic as critics
from bessemer.data.batch import Batch
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.trainer import Trainer

PAD = 2


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at_the_end(reward_R, length_R, width):
    reward_RL = torch.zeros(len(reward_R), width, dtype=torch.float64)
    reward_RL[torch.arange(len(reward_R)), length_R - 1] = reward_R
    return reward_RL


def gae_by_definition(rewards, value, length, lam, gamma):
    """Every advantage as an explicit sum, O(T^2) in all."""
    values = [*value[:length], 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_against_its_double_sum(lam, gamma):
    length, value, reward = torch.tensor([1, 7, 12, 3]), random(4, 12), random(4, 12, seed=1)
    actual = critics.gae(reward, value, length, lam, gamma)
    for r, n in enumerate(length.tolist()):
        expected = gae_by_definition(reward[r].tolist(), value[r].tolist(), n, lam, gamma)
        assert actual[r, :n].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert not actual[r, n:].any(), "nothing behind the end"


def test_gae_with_lambda_one_is_return_minus_value_and_with_zero_one_step():
    value, reward = random(1, 5), random(1, seed=1)
    length = torch.tensor([5])
    last = at_the_end(reward, length, 5)
    assert torch.allclose(critics.gae(last, value, length, 1.0), reward - value, rtol=0, atol=1e-14)
    one_step = torch.cat((value[:, 1:], reward[None]), 1) - value
    assert torch.allclose(critics.gae(last, value, length, 0.0), one_step, rtol=0, atol=1e-14)


def test_text_after_an_end_does_not_matter():
    value, reward, length = random(2, 6), random(2, 6, seed=1), torch.tensor([4, 6])
    other, more = value.clone(), reward.clone()
    other[0, 4:], more[0, 4:] = 1e6, -1e6
    assert torch.equal(critics.gae(reward, value, length, 0.9), critics.gae(more, other, length, 0.9))


@pytest.mark.parametrize(
    ("value", "old", "wanted", "error", "slope", "clipped"),
    [
        (0.5, 0.5, 1.0, 0.125, -0.5, 0),  # unmoved: half the squared error
        (0.6, 0.5, 1.0, 0.08, -0.4, 0),  # moving towards the target, within the clip
        (0.9, 0.5, 1.0, 0.045, 0.0, 1),  # too far in one rollout: clipped at 0.7, no gradient
        (0.2, 0.5, 1.0, 0.32, -0.8, 0),  # moving away: the unclipped error is larger and pulls back
        (1.5, 0.5, 1.0, 0.125, 0.5, 0),  # past the target: pulls back
    ],
)
def test_the_clipped_value_loss(value, old, wanted, error, slope, clipped):
    value, old, wanted = (torch.tensor([x], dtype=torch.float64) for x in (value, old, wanted))
    value.requires_grad_()
    actual, cut = critics.value_errors(value, old, wanted, 0.2)
    actual.sum().backward()
    assert actual.item() == pytest.approx(error) and value.grad.item() == pytest.approx(slope) and cut.item() == clipped


def row(prompt, answer, value=0.0, wanted=0.0):
    made = completion(answer, prompt_tokens=len(prompt))
    per_token = {"value": [value] * len(answer), "return": [wanted] * len(answer)}
    verdict = Verdict(True, True, "", None)
    return ScoredSample(Problem("p", "", "en"), prompt, made, verdict, per_token=per_token)


def test_a_critic_begins_with_the_policy_s_layers_and_expects_nothing(model):
    critic = critics.critic_of(model)
    assert critic.score.weight.shape == (1, model.cfg.dim) and not critic.score.weight.any()
    policy, mine = model.state_dict(), critic.state_dict()
    assert {name for name in policy if name not in mine} == {n for n in policy if n.startswith(("mtp.", "head."))}
    assert all(torch.equal(mine[name], policy[name]) for name in mine if name != "score.weight")
    assert mine["embed.weight"].data_ptr() != policy["embed.weight"].data_ptr()
    (batch,) = to_batches([row([4, 5], [7, 8, 9])], PAD, 100, "token")
    assert not critics.values(critic, batch).any()


@torch.no_grad()
def test_a_value_is_read_before_its_token(model):
    """It comes from the hidden state before its token, so an output's last token changes none of its values."""
    critic = critics.critic_of(model).eval()
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(1))
    (batch,) = to_batches([row([4, 5], [7, 8, 9]), row([6], [3, 3])], PAD, 100, "token")
    actual = critics.values(critic, batch)
    hidden = critic.norm(critic.hidden(batch.tokens_BT)) @ critic.score.weight.T
    assert torch.allclose(actual, torch.cat((hidden[0, 1:4, 0], hidden[1, 0:2, 0])), atol=1e-6)
    batch.tokens_BT[0, 4] = 11
    assert torch.allclose(critics.values(critic, batch), actual, atol=1e-6)
    batch.tokens_BT[0, 3] = 11
    assert (critics.values(critic, batch) - actual).abs()[2] > 0.01


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_the_value_loss_is_weighted_like_the_policy_s(model, normalise):
    """Against a loop over outputs, in three micro-batches; prompts and padding count for nothing."""
    critic = critics.critic_of(model).eval()
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(1))
    rows = [row([4, 5], [7, 8, 9], -1.0, 1.0), row([6], [3], -0.2, 0.5), row([6, 9, 9], [3, 4, 5, 6, 7], 1.0, -1.0)]
    losses = [critics.ValueLoss(0.2)(critic, batch) for batch in to_batches(rows, PAD, 16, normalise)]
    assert len(losses) == 3
    actual = float(sum(loss.total.detach() for loss in losses) / sum(loss.tokens for loss in losses))
    per_output = []
    for one in rows:
        ids = torch.tensor([[*one.prompt_tokens, *one.completion.tokens]])
        with torch.no_grad():
            value = (critic.norm(critic.hidden(ids)) @ critic.score.weight.T)[0, len(one.prompt_tokens) - 1 : -1, 0]
        old, wanted = (torch.tensor(one.per_token[name]) for name in ("value", "return"))
        near = old + (value - old).clamp(-0.2, 0.2)
        per_output.append(0.5 * torch.maximum((value - wanted) ** 2, (near - wanted) ** 2))
    expected = torch.stack([x.mean() for x in per_output]) if normalise == "sequence" else torch.cat(per_output)
    assert actual == pytest.approx(float(expected.mean()), rel=1e-5)
    assert sum(float(loss.metrics["clip_share"]) for loss in losses) > 0


def test_advantages_of_tokens_lie_where_their_tokens_lie():
    one = row([4, 5], [7, 8, 9])
    one.advantage, one.per_token = [1.0, -2.0, 3.0], {"value": [0.1, 0.2, 0.3], "return": [4.0, 5.0, 6.0]}
    (batch,) = to_batches([one, row([6], [3])], PAD, 100, "token")
    assert batch.extras["advantage_BT"][0].tolist() == [0, 0, 1, -2, 3] and not batch.extras["advantage_BT"][1].any()
    assert batch.extras["value_BT"][0].tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.3])
    assert batch.extras["return_BT"][0].tolist() == [0, 0, 4, 5, 6]


def test_a_critic_learns_what_each_first_token_is_worth(model):
    """Outputs that begin with 7 are worth 1, those with 8 are worth 0: so after the first token, and 1/2 before it."""
    run = Trainer(critics.critic_of(model), critics.ValueLoss(), None, *train_config(lr=3e-3, weight_decay=0.0))
    rows = [row([4, 5], [first, 9, 9], 0.0, float(first == 7)) for first in (7, 8)]

    def seen():
        with torch.no_grad():
            (batch,) = to_batches(rows, PAD, 100, "token")
            return critics.values(run.model.eval(), batch).view(2, 3)

    for _ in range(60):
        for one, mine in zip(rows, seen().tolist(), strict=True):
            one.per_token["value"] = mine
        run.update(to_batches(rows, PAD, 100, "token"))
    actual = seen()
    assert actual[0, 1:].tolist() == pytest.approx([1.0, 1.0], abs=0.1)
    assert actual[1, 1:].tolist() == pytest.approx([0.0, 0.0], abs=0.1)
    assert actual[:, 0].tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_the_batch_type_is_checked_for_the_new_extras():
    with pytest.raises(AssertionError, match="value_BT"):
        Batch(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), extras={"value_BT": torch.zeros(1, 2)})
