"""OpenRLHF: `PolicyLoss`, `aggregate_loss` and `compute_approx_kl`."""

import torch
from table_model import absent

absent(
    "deepspeed",
    "vllm",
    "flash_attn",
    "ring_flash_attn",
    "bitsandbytes",
    "optree",
    "torchmetrics",
    "wandb",
    "pylatexenc",
)

from openrlhf.models.loss import PolicyLoss, aggregate_loss  # noqa: E402
from openrlhf.models.utils import compute_approx_kl  # noqa: E402


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, level):
    if ratio == "sequence" and level == "token":
        raise NotImplementedError("GSPO takes means over sequences")
    loss_fn = PolicyLoss(
        clip_low, clip_high, dual_clip or None, level == "token", {"token": "ppo", "sequence": "gspo"}[ratio]
    )
    x = torch.tensor(logprobs, requires_grad=True)
    a = torch.tensor(advantages)[:, None].expand_as(x)
    loss = loss_fn(x, torch.tensor(old_logprobs), a, torch.tensor(mask).double())
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return {"loss": loss.detach(), "gradient": x.grad}


def kl_terms(logprobs, ref_logprobs, old_logprobs, form):
    if form == "k3-unbiased":
        raise NotImplementedError("k1, k2 and k3")
    x = torch.tensor(logprobs, requires_grad=True)
    kl = compute_approx_kl(x, torch.tensor(ref_logprobs), kl_estimator=form)
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    return {"kl": kl, "gradient": gradient}


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    x, keep = torch.tensor(logprobs, requires_grad=True), torch.tensor(mask).double()
    kl = compute_approx_kl(x, torch.tensor(ref_logprobs), kl_estimator=form)
    loss = beta * aggregate_loss(kl, keep, level == "token")  # the actor adds this product to its loss
    loss.backward()
    return {"loss": loss.detach(), "gradient": x.grad}


def loss_weights(mask, micro_batch, level, length):
    if level == "constant":
        raise NotImplementedError("means over tokens or over sequences")
    x = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    for m in sorted(set(micro_batch.tolist())):
        rows = torch.tensor(micro_batch == m)
        aggregate_loss(
            x[rows], torch.tensor(mask)[rows].double(), level == "token", batch_num_tokens=float(mask.sum()),
            global_batch_size=float(len(mask)),
        ).backward()  # fmt: skip
    return {"weights": x.grad}
