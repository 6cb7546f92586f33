"""NeMo RL: `ClippedPGLossFn` and `calculate_kl`, from a checkout (NEMO_RL=folder), without its engines."""

import torch
from table_model import absent, checkout

checkout("NEMO_RL")
absent("megatron", "nemo_automodel", "vllm", "wandb", "swanlab", "mlflow", "tensorboard", "pynvml", "nvtx", "fastokens")

from nemo_rl.algorithms.logits_sampling_utils import apply_top_k_top_p  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn  # noqa: E402
from nemo_rl.algorithms.utils import calculate_kl  # noqa: E402


def _run(logprobs, mask, *, old=None, ref=None, advantages=None, extra=None, rows=None, **config):
    """One call of the loss, or one for each micro-batch in `rows`, added as its trainers do."""
    x = torch.tensor(logprobs, requires_grad=True)
    keep = torch.tensor(mask, dtype=x.dtype)
    old = x.detach() if old is None else torch.tensor(old)
    a = torch.zeros(len(x), dtype=x.dtype) if advantages is None else torch.tensor(advantages)
    loss_fn = ClippedPGLossFn(
        ClippedPGLossConfig(**{"reference_policy_kl_penalty": 0.0, "kl_output_clamp_value": None, **config})
    )
    total = 0.0
    for part in [torch.arange(len(x))] if rows is None else rows:

        def first(values, part=part):  # the data carry a column for the prompt, which the loss drops
            return torch.cat([torch.zeros(len(part), 1, dtype=x.dtype), values[part]], 1)

        data = {
            "input_ids": torch.zeros(len(part), x.shape[1] + 1, dtype=torch.int64),
            "advantages": first(a[:, None].expand_as(x)), "prev_logprobs": first(old),
            "generation_logprobs": first(old), "token_mask": first(keep),
            "reference_policy_logprobs": first(old if ref is None else torch.tensor(ref)),
            "sample_mask": torch.ones(len(part), dtype=x.dtype),
            "curr_logprobs_unfiltered": x[part],
        }  # fmt: skip
        data.update({key: torch.tensor(value)[part] for key, value in (extra or {}).items()})
        total = total + loss_fn(
            next_token_logprobs=x[part], data=data, global_valid_seqs=torch.tensor(float(len(x))),
            global_valid_toks=keep.sum(),
        )[0]  # fmt: skip
    total.backward()
    return {"loss": total, "gradient": x.grad}


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, level):
    if ratio == "sequence" and level == "token":
        raise NotImplementedError("refuses sequence ratios with a mean over tokens")
    return _run(
        logprobs, mask, old=old_logprobs, advantages=advantages, ratio_clip_min=clip_low, ratio_clip_max=clip_high,
        ratio_clip_c=dual_clip or None, sequence_level_importance_ratios=ratio == "sequence",
        token_level_loss=level == "token",
    )  # fmt: skip


def kl_terms(logprobs, ref_logprobs, old_logprobs, form):
    if form == "k3-unbiased":
        raise NotImplementedError("its importance weight is part of the loss, not of the term")
    x = torch.tensor(logprobs, requires_grad=True)
    kl = calculate_kl(x, torch.tensor(ref_logprobs), form, None, None)
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    return {"kl": kl, "gradient": gradient}


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    return _run(
        logprobs, mask, ref=ref_logprobs, reference_policy_kl_penalty=beta, reference_policy_kl_type=form,
        kl_input_clamp_value=None, token_level_loss=level == "token",
    )  # fmt: skip


def loss_weights(mask, micro_batch, level, length):
    if level == "constant":
        raise NotImplementedError("has no constant divisor")
    rows = [torch.tensor((micro_batch == m).nonzero()[0]) for m in sorted(set(micro_batch.tolist()))]
    x = -torch.ones(mask.shape, dtype=torch.float64)
    out = _run(
        x.numpy(), mask, advantages=-torch.ones(len(x)).double().numpy(), rows=rows, token_level_loss=level == "token"
    )
    return {"weights": out["gradient"]}


def positive_nll(logprobs, mask, rewards, micro_batch, weight):
    rows = [torch.tensor((micro_batch == m).nonzero()[0]) for m in sorted(set(micro_batch.tolist()))]
    return _run(logprobs, mask, rows=rows, extra={"rewards": rewards}, positive_example_nll_weight=weight)


def kept_logprobs(logits, temperature, top_k, top_p):
    filtered, kept = apply_top_k_top_p(torch.tensor(logits) / temperature, top_k or None, top_p)
    kept = torch.ones_like(filtered, dtype=torch.bool) if kept is None else kept.bool()
    return {"kept": kept, "logprobs": filtered.log_softmax(-1).masked_fill(~kept, float("-inf"))}
