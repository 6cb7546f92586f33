"""verl: installed, or a checkout (VERL=folder).

Up to 0.2 the KL term is inside `DataParallelPPOActor.update_policy`, so the actor updates a table of log-probabilities;
later versions have `agg_loss`, `kl_penalty` and the policy losses of `core_algos`.
"""

import os
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from table_model import EOS, FIRST_PROMPT, Table, absent, checkout

if os.environ.get("VERL"):
    checkout("VERL")
if os.environ.get("VERL") or version("verl") < "0.3":  # the old actor imports them at its head
    absent("flash_attn", "vllm", "megatron", but=("flash_attn.ops",))
absent("sglang", "wandb", "codetiming")

from verl.trainer.ppo import core_algos  # noqa: E402

OLD = not hasattr(core_algos, "agg_loss")
FORMS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


def group_advantages(rewards, groups, std, eps):
    if std == "population" or (OLD and std == "none"):
        raise NotImplementedError("divides by the standard deviation of a sample" + ("" if OLD else ", or not at all"))
    more = {"eos_mask": None} if OLD else {"response_mask": None, "norm_adv_by_std_in_grpo": std == "sample"}
    mask = torch.ones(len(rewards), 1)
    more = {key: mask if value is None else value for key, value in more.items()}
    advantages, _ = core_algos.compute_grpo_outcome_advantage(torch.tensor(rewards)[:, None], index=groups, **more)
    return {"advantages": advantages[:, 0]}


def kl_terms(logprobs, ref_logprobs, old_logprobs, form):
    if form not in FORMS:
        raise NotImplementedError(form)
    x = torch.tensor(logprobs, requires_grad=True)
    kl = core_algos.kl_penalty(x, torch.tensor(ref_logprobs), FORMS[form])
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    return {"kl": kl, "gradient": gradient}


def _update(logprobs, old, ref, advantages, mask, beta=0.0, form="k3", clip=0.2):
    """One step of the old actor: the loss from its metrics, d loss / d log-probabilities from the table."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.workers.actor import dp_actor

    TensorDict.cuda = lambda self: self
    rows, tokens = mask.shape
    table = Table(logprobs)
    module = torch.nn.Module()
    module.table = table
    module.forward = lambda input_ids, **_: SimpleNamespace(logits=table.logits(input_ids))
    config = SimpleNamespace(
        ulysses_sequence_parallel_size=1, use_kl_loss=beta != 0, kl_loss_coef=beta, kl_loss_type=FORMS[form],
        ppo_mini_batch_size=rows, ppo_micro_batch_size_per_gpu=rows, ppo_micro_batch_size=rows,
        use_dynamic_bsz=False, clip_ratio=clip, entropy_coeff=0.0, grad_clip=1e9, get=lambda key, default=None: default,
        shuffle=False, ppo_epochs=1,
    )  # fmt: skip
    gradients = []
    optimizer = torch.optim.SGD([table.table], lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.append(table.table.grad.clone()))
    actor = dp_actor.DataParallelPPOActor(config, module, optimizer)
    prompts = FIRST_PROMPT + torch.arange(rows)[:, None]
    responses = torch.full((rows, tokens), EOS)
    ids = torch.cat([prompts, responses], 1)
    attention = torch.cat([torch.ones(rows, 1, dtype=torch.int64), torch.tensor(mask).long()], 1)
    data = DataProto.from_dict({
        "responses": responses, "input_ids": ids, "attention_mask": attention, "position_ids": torch.ones_like(ids),
        "old_log_probs": torch.tensor(old), "ref_log_prob": torch.tensor(ref),
        "advantages": torch.tensor(advantages)[:, None].expand(-1, tokens).clone(),
    }, meta_info={"temperature": 1.0})  # fmt: skip
    metrics = actor.update_policy(data)
    return {"gradient": gradients[0]}, metrics


def _agg(terms, mask, level, **more):
    mode = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}[level]
    return core_algos.agg_loss(terms, torch.tensor(mask).double(), mode, **more)


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    if not OLD:
        x = torch.tensor(logprobs, requires_grad=True)
        kl = core_algos.kl_penalty(x, torch.tensor(ref_logprobs), FORMS[form])
        loss = beta * _agg(kl, mask, level)  # workers/utils/losses.py adds this product to the loss
        loss.backward()
        return {"loss": loss, "gradient": x.grad}
    if level != "token":
        raise NotImplementedError("means over the tokens of a micro-batch")
    out, _ = _update(logprobs, logprobs, ref_logprobs, np.zeros(len(mask)), mask, beta, form)
    return out


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, level):
    if OLD:
        if ratio != "token" or level != "token" or clip_low != clip_high or dual_clip:
            raise NotImplementedError("one clip range, means over tokens")
        out, metrics = _update(logprobs, old_logprobs, logprobs, advantages, mask, clip=clip_low)
        return {**out, "loss": metrics["actor/pg_loss"][0]}
    from verl.workers.config import FSDPActorConfig

    if dual_clip == 0 and ratio == "token":
        dual_clip = 1e9  # verl always has this bound
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=clip_low,
        clip_ratio_high=clip_high, clip_ratio_c=dual_clip or 1e9,
    )  # fmt: skip
    x = torch.tensor(logprobs, requires_grad=True)
    name = {"token": "vanilla", "sequence": "gspo"}[ratio]
    loss, _ = core_algos.get_policy_loss_fn(name)(
        torch.tensor(old_logprobs), x, torch.tensor(advantages)[:, None].expand_as(x), torch.tensor(mask).double(),
        {"token": "token-mean", "sequence": "seq-mean-token-mean"}[level], config,
    )  # fmt: skip
    loss.backward()
    return {"loss": loss, "gradient": x.grad}


def loss_weights(mask, micro_batch, level, length):
    if OLD:
        raise NotImplementedError("see kl_loss: a mean over the tokens of each micro-batch")
    x = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    more = {"batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask), "loss_scale_factor": length or None}
    for m in sorted(set(micro_batch.tolist())):
        rows = micro_batch == m
        _agg(x[torch.tensor(rows)], mask[rows], level, **more).backward()
    return {"weights": x.grad}
