"""Bessemer itself under the vectors: the functions that its recipes run, as any other project's.

RL goes through the batches and objectives of the trainer, with a network that knows two tokens: its hidden state is the
log-odds of the second, so that any log-probability can be given and a gradient read back.
"""

from array import array
from functools import partial

import numpy as np
import torch

from bessemer.addons.accelerate.precision.emulation import reference_gemm
from bessemer.addons.accelerate.precision.formats import round_e5m6
from bessemer.addons.accelerate.precision.operand import quantise
from bessemer.addons.distributed.schedules import schedule as schedule_named
from bessemer.addons.distributed.table import Pair
from bessemer.addons.r1.correction import importance_weights as weights_of
from bessemer.addons.r1.off_policy_mask import off_policy_mask as masked
from bessemer.data.batch import Batch
from bessemer.data.chat import render
from bessemer.engine.generation import Completion
from bessemer.engine.sampling import probabilities, rules
from bessemer.engine.sequence import SamplingParams
from bessemer.model.config import ModelConfig
from bessemer.model.gate import Gate, routing
from bessemer.model.mla import MLA, rope_frequencies, rotate
from bessemer.model.protocol import TrainOutputs
from bessemer.rl.algorithms.grpo import compared, grpo
from bessemer.rl.algorithms.gspo import gspo
from bessemer.rl.algorithms.reinforce import reinforce
from bessemer.rl.losses import GRPO, exp, k3
from bessemer.rl.rollout import MODEL, Packing, ScoredSample
from bessemer.tasks import verdict_metrics
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import Problem, Verdict
from bessemer.train import balance
from bessemer.train.loss import logprobs_of_logits

NAME = "bessemer"


def tensor(values):
    return torch.from_numpy(np.asarray(values))


# ---- the trainer's batches -----------------------------------------------------------------------------------------


def sample(old, mask, advantage, ref):
    """A completion of the row's tokens up to its last trained one; what is not trained on in between, a tool wrote."""
    length = int(mask.nonzero()[0].max(initial=0)) + 1
    turns = [(MODEL if trained else "tool", 1, "") for trained in mask[:length]]
    completion = Completion(array("i", [1] * length), "", array("f", old[:length]), "stop", 1)
    verdict = Verdict(True, True, "", None)
    made = ScoredSample(Problem("p", "", "en"), [0], completion, verdict, advantage=float(advantage), turns=turns)
    if ref is not None:
        made.per_token["ref_logp"] = ref[:length][mask[:length]].tolist()
    return made


def step(objective, logprobs, old, advantages, mask, level, ref=None, micro_batch=None):
    """Loss and gradient of one step: the sums of its micro-batches, divided once, as the trainer does."""
    micro = np.zeros(len(mask), dtype=int) if micro_batch is None else micro_batch
    total, tokens, gradient = 0.0, 0.0, np.zeros(mask.shape)
    parts = []
    for number in sorted(set(micro.tolist())):
        rows = sorted(np.nonzero(micro == number)[0], key=lambda b: -int(mask[b].nonzero()[0].max(initial=0)))
        made = [[sample(old[b], mask[b], advantages[b], None if ref is None else ref[b])] for b in rows]
        batch = Packing(10**6, 0, level, packs=False).batch(made, made)
        odds = torch.zeros(*batch.tokens_BT.shape, 1)
        for row, b in enumerate(rows):
            width = odds.shape[1] - 1
            p = np.exp(logprobs[b, :width])
            odds[row, :width, 0] = tensor(np.log(p / (1 - p)))
        hidden = odds.requires_grad_()
        loss = objective.of(TrainOutputs(hidden, [], torch.zeros(())), torch.tensor([[0.0], [1.0]]), batch)
        loss.total.backward()
        total, tokens = total + float(loss.total.detach()), tokens + float(loss.tokens)
        parts.append((rows, hidden.grad[:, :-1, 0].double().numpy()))
    for rows, grad in parts:
        for row, b in enumerate(rows):
            width = grad.shape[1]
            gradient[b, :width] = grad[row] / (1 - np.exp(logprobs[b, :width])) / tokens  # d log p / d log-odds = 1 - p
    return {"loss": total / tokens, "gradient": gradient}


def group_advantages(rewards, groups, std, eps):
    if std == "sample":
        raise NotImplementedError("the population's standard deviation only")
    names, index = np.unique(groups, return_inverse=True)
    members = [np.nonzero(index == g)[0] for g in range(len(names))]
    table = torch.zeros(len(names), max(2, *map(len, members)))
    sound = torch.zeros_like(table, dtype=torch.bool)
    for g, rows in enumerate(members):
        table[g, : len(rows)], sound[g, : len(rows)] = tensor(rewards[rows]).float(), True
    result = compared(table, std == "population", sound)
    advantages = np.zeros(len(rewards))
    for g, rows in enumerate(members):
        advantages[rows] = result[g, : len(rows)].numpy()
    return advantages


def loss_mask(completion_mask, tool_mask, truncated):
    if truncated.any():
        raise NotImplementedError("truncated completions train")
    objective = GRPO(reinforce, kl=0.0)
    mask = completion_mask & tool_mask
    flat = np.full(mask.shape, -1.0)
    gradient = step(objective, flat, flat, np.ones(len(mask)), mask, "token")["gradient"]
    return {"mask": gradient != 0, "tokens": round(1 / -gradient.min())}


def loss_weights(mask, micro_batch, level, length):
    flat = np.full(mask.shape, -1.0)
    objective = GRPO(reinforce, kl=0.0, constant=length)
    given = "token" if level == "constant" else level
    return -step(objective, flat, flat, np.ones(len(mask)), mask, given, micro_batch=micro_batch)["gradient"]


def policy_loss(
    logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, level
):  # fmt: skip
    if dual_clip:
        raise NotImplementedError("no dual clip")
    loss = partial(grpo if ratio == "token" else gspo, clip_low=clip_low, clip_high=clip_high)
    return step(GRPO(loss, kl=0.0), logprobs, old_logprobs, advantages, mask, level)


def of_rows(mask, *values):
    """Values of the trained tokens, and the number of each one's row."""
    return (*(tensor(value[mask]) for value in values), tensor(mask.nonzero()[0]))


def sequence_ratio(logprobs, old_logprobs, mask):
    logp, old, row = of_rows(mask, logprobs, old_logprobs)
    ratio = gspo(logp, old, torch.ones_like(logp), row).ratio
    return [ratio[row == b][0] for b in range(len(mask))]


def kl_terms(logprobs, ref_logprobs, old_logprobs, form):
    if form not in ("k3", "k3-unbiased"):
        raise NotImplementedError("k3 only")
    logp = tensor(logprobs).requires_grad_()
    kl = k3(logp, tensor(ref_logprobs))
    if form == "k3-unbiased":
        kl = exp(logp - tensor(old_logprobs)) * kl
    kl.sum().backward()
    return {"kl": kl.detach(), "gradient": logp.grad}


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    if form != "k3":
        raise NotImplementedError("k3 only")
    return step(GRPO(reinforce, kl=beta), logprobs, logprobs, np.zeros(len(mask)), mask, level, ref_logprobs)


def off_policy_mask(logprobs, old_logprobs, advantages, mask, limit):
    every = np.broadcast_to(advantages[:, None], mask.shape)
    logp, old, advantage, row = of_rows(mask, logprobs, old_logprobs, every)
    value = masked(logp, old, advantage, row, limit=limit).value
    return [bool((value[row == b] != 0).any()) for b in range(len(mask))]


def importance_weights(trainer_logprobs, sampler_logprobs, mask, mode, cap):
    gap, row = of_rows(mask, trainer_logprobs - sampler_logprobs)
    weight, cut = weights_of(mode, gap, row, cap)
    weights = np.zeros(mask.shape)
    weights[mask] = weight.numpy()
    return {"weights": weights, "cut_share": cut.mean()}


def token_logprobs(logits, tokens, temperature):
    logp, _, entropy = logprobs_of_logits(tensor(logits).float(), tensor(tokens), temperature, True)
    return {"logprobs": logp, "entropy": entropy}


def kept_logprobs(logits, temperature, top_k, top_p):
    params = [SamplingParams(temperature, top_p, top_k)] * len(logits)
    p = probabilities(tensor(logits).float(), rules(params, torch.device("cpu")), logits.shape[1])
    return {"kept": p > 0, "logprobs": p.log()}


# ---- evaluation ----------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    estimates = [
        verdict_metrics.pass_at_k(int(samples), int(correct), k) for samples, correct in zip(n, c, strict=True)
    ]
    return {"estimates": estimates, "mean": sum(estimates) / len(estimates)}


def pass_at_1(texts, gold):
    answers = [[parse_reply(text).answer for text in of] for of in texts]
    verdicts = [
        [Verdict(answer == right, True, "", answer) for answer in of] for of, right in zip(answers, gold, strict=True)
    ]
    shares = verdict_metrics.pass_at_1(verdicts)
    return {"per_problem": shares, "mean": sum(shares) / len(shares)}


def cons_at_k(answers, gold, ties):
    if ties == "first":
        raise NotImplementedError("ties share the vote")
    correct = [
        verdict_metrics.maj_at_k(of, [answer == right for answer in of])
        for of, right in zip(answers, gold, strict=True)
    ]
    return {"correct": correct, "mean": sum(correct) / len(correct)}


# ---- mixture of experts --------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 8, "dim": 8, "n_layers": 1, "n_dense_layers": 0, "inter_dim": 8, "moe_inter_dim": 8, "n_heads": 1,
    "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 8,
    "n_activated_experts": 2,
}  # fmt: skip


def routed(logits, bias, cfg, sequences=1, choice=None):
    """`routing` of logits that are the inputs themselves."""
    x = tensor(logits).float().requires_grad_()
    bias = None if cfg.topk_method != "noaux_tc" else tensor(bias).float()
    return x, routing(x, torch.eye(x.shape[1]), bias, choice, sequences, cfg, True)


def scattered(shape, experts, weights):
    return torch.zeros(shape).scatter(1, experts, weights)


def gate(logits, bias, groups, kept_groups, top_k, score, group_score, normalise, scale):
    method = "noaux_tc" if group_score == "top2" else "group_limited_greedy"
    cfg = ModelConfig.make(
        SIZES | {
            "n_routed_experts": logits.shape[1], "n_activated_experts": top_k, "n_expert_groups": groups,
            "n_limited_groups": kept_groups, "score_func": score, "topk_method": method, "norm_topk_prob": normalise,
            "route_scale": scale,
        }
    )  # fmt: skip
    _, (experts, weights, *_) = routed(logits, bias, cfg)
    dense = scattered(logits.shape, experts, weights.detach())
    return {"chosen": scattered(logits.shape, experts, torch.ones_like(dense)).bool(), "weights": dense}


def gate_replay(logits, chosen, score, normalise, scale, cotangent):
    count = int(chosen[0].sum())
    cfg = ModelConfig.make(
        SIZES | {
            "n_routed_experts": logits.shape[1], "n_activated_experts": count, "score_func": score,
            "norm_topk_prob": normalise, "route_scale": scale, "topk_method": "greedy",
        }
    )  # fmt: skip
    choice = tensor(chosen.nonzero()[1].reshape(len(chosen), count))
    x, (experts, weights, *_) = routed(logits, None, cfg, choice=choice)
    dense = scattered(logits.shape, experts, weights)
    (dense * tensor(cotangent)).sum().backward()
    return {"weights": dense.detach(), "gradient": x.grad}


def balance_update(bias, counts, rate):
    gate = Gate(ModelConfig.make(SIZES | {"n_routed_experts": len(bias)}))
    gate.bias_E.copy_(tensor(bias))
    gate.load_E.copy_(tensor(counts.sum(0)))  # the trainer's sum over ranks
    balance.update({"0": gate}, rate)
    return gate.bias_E


def balance_loss(logits, chosen, alpha, score):
    S, T, E = logits.shape
    count = int(chosen[0, 0].sum())
    cfg = ModelConfig.make(
        SIZES | {"n_routed_experts": E, "n_activated_experts": count, "score_func": score, "topk_method": "greedy"}
    )  # fmt: skip
    choice = tensor(chosen.reshape(S * T, E).nonzero()[1].reshape(S * T, count))
    x, (*_, term, _) = routed(logits.reshape(S * T, E), None, cfg, S, choice)
    loss = alpha * term / S
    loss.backward()
    return {"loss": loss.detach(), "gradient": x.grad.reshape(S, T, E)}


# ---- rows, positions, attention ------------------------------------------------------------------------------------


def mtp_labels(tokens, segments, depth):
    starts = np.concatenate([[True], segments[1:] != segments[:-1]])
    batch = Batch(tensor(tokens)[None], tensor(~starts)[None].float(), tensor(segments)[None])
    rows = []
    for k in range(depth + 1):
        target, weight = batch.predicted(k + 1)
        row = torch.full((len(tokens),), -100)
        row[: target.shape[1]] = torch.where(weight[0] > 0, target[0], -100)
        rows.append(row)
    return {"labels": torch.stack(rows)}


def yarn(dim, base, factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim, head_dim):
    cfg = ModelConfig.make(
        SIZES | {
            "qk_rope_head_dim": dim, "qk_nope_head_dim": head_dim - dim, "rope_theta": base, "rope_factor": factor,
            "original_seq_len": original_length, "beta_fast": beta_fast, "beta_slow": beta_slow, "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
        }
    )  # fmt: skip
    return {
        "inv_freq": rope_frequencies(cfg), "table_scale": cfg.rope_scale, "softmax_scale": cfg.softmax_scale,
    }  # fmt: skip


def table(positions, inv_freq):
    angle = tensor(positions)[:, None] * tensor(inv_freq)
    return torch.stack((angle.cos(), angle.sin()), -1).float()


def rope_scores(q, k, positions, inv_freq, pairs):
    if pairs != "interleaved":
        raise NotImplementedError("DeepSeek's pairs only")
    rope = table(positions, inv_freq)
    return rotate(tensor(q), rope) @ rotate(tensor(k), rope).T


def mla(x, segments, heads, nope, rope, value, inv_freq, softmax_scale, eps, form, out, **weights):
    cfg = ModelConfig.make(
        SIZES | {
            "dim": x.shape[1], "n_heads": heads, "q_lora_rank": len(weights["q_norm"]),
            "kv_lora_rank": len(weights["kv_norm"]), "qk_nope_head_dim": nope, "qk_rope_head_dim": rope,
            "v_head_dim": value,
        }
    )  # fmt: skip
    layer = MLA(cfg)
    names = {"kv_down": "wkv_a", "kv_norm": "kv_norm", "kv_up": "wkv_b"}
    names |= {"q_down": "wq_a", "q_norm": "q_norm", "q_up": "wq_b"} if cfg.q_lora_rank else {"q_up": "wq"}
    state = {f"{own}.weight": tensor(weights[name]) for name, own in names.items()} | {"wo.weight": tensor(out)}
    layer.load_state_dict(state)
    at, x_BTD, row = table(np.arange(len(x)), inv_freq), tensor(x).float()[None], tensor(segments)[None]
    with torch.no_grad():
        if form == "expanded":
            result = layer(x_BTD, at, row)
        else:
            visible = (row[0][:, None] == row[0]).tril()
            result = layer.absorbed(x_BTD, layer.latent(x_BTD, at), visible[None], at)
        return {"output": result[0], "latent": layer.compress(x_BTD)[0][0]}


# ---- number formats, pipelines, texts ------------------------------------------------------------------------------


def fp8_tiles(x, tile_rows, tile_cols, scales):
    group = {(1, 128): "tile", (128, 128): "block"}.get((tile_rows, tile_cols))
    if group is None:
        raise NotImplementedError("tiles of 1 x 128 and 128 x 128 only")
    operand = quantise(tensor(x), group, scales == "power-of-two")
    return {"values": operand.dequantise(), "factors": operand.scale_MJ[::tile_rows]}


def fp8_matmul(a, b):
    return reference_gemm(quantise(tensor(a), "tile"), quantise(tensor(b), "block"))


def e5m6(x):
    return round_e5m6(tensor(x))


def pipeline_table(schedule, ranks, micro_batches):
    made = schedule_named({"dualpipev": "dualpipe-v"}.get(schedule, schedule), ranks, micro_batches)
    return {
        "actions": [
            [[tuple(action) for action in (step if isinstance(step, Pair) else (step,))] for step in steps]
            for steps in made.steps
        ]
    }


def chat_template(model, messages, add_generation_prompt):
    if model != "deepseek-r1" or any(message.get("tool_calls") for message in messages):
        raise NotImplementedError("R1's template without tools only")
    return render(messages, "r1", add_generation_prompt)
