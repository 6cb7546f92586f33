"""The loss "off-policy-mask" of DeepSeek-V3.2: bad outputs that the policy has left count nothing, all others as in
GRPO. The comparison with TRL's is in test_rl_trl.py."""

import torch

from bessemer import plugins
from bessemer.addons.r1.off_policy_mask import off_policy_mask
from bessemer.rl.algorithms.grpo import grpo


def test_only_bad_outputs_that_the_policy_has_left_are_masked():
    generator = torch.Generator().manual_seed(3)
    output_N = torch.tensor([0, 0, 2, 2, 2, 5, 7, 7])  # rows without a trained token have no number here
    advantage_N = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0])
    left_N = torch.tensor([0.3, -0.1, 0.1, -0.1, -0.1, 0.4, 0.06, 0.06])
    old_N = -torch.rand(8, generator=generator, dtype=torch.float64)
    logp_N = (old_N - left_N).requires_grad_()
    masked_N = torch.tensor([True, True, False, False, False, False, True, True])
    masked, plain = (loss(logp_N, old_N, advantage_N, output_N) for loss in (off_policy_mask, grpo))
    assert not masked.value[masked_N].any() and torch.equal(masked.value[~masked_N], plain.value[~masked_N])
    assert masked.clipped[masked_N].all() and torch.equal(masked.clipped[~masked_N], plain.clipped[~masked_N])
    (gradient,) = torch.autograd.grad(masked.value.sum(), logp_N)
    assert not gradient[masked_N].any() and gradient[~masked_N].any()
    stricter = off_policy_mask(logp_N, old_N, advantage_N, output_N, limit=0.2)
    assert torch.equal(stricter.value, plain.value), "no output is that far away"


def test_a_recipe_finds_it_by_its_name():
    assert plugins.is_built_in("losses", "off-policy-mask")
