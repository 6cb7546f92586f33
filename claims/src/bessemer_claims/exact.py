"""What follows from published shapes and published figures by arithmetic alone: no run, no noise.

Each function computes the values of one claim, under the names that its rule and its sentences use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from bessemer.addons.accelerate.precision import activations
from bessemer.addons.accelerate.precision.operand import TILE
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.timeline import Costs, simulate
from bessemer.addons.evals.mean_interval import wilson
from bessemer.addons.plan.hardware import device, efficiency, parse_cluster
from bessemer.addons.plan.plan_config import published, setup
from bessemer.hf import mapping
from bessemer.model import accounting
from bessemer.model.config import ModelConfig, preset
from bessemer_claims.registry import claims, read_toml, rules

Values = dict[str, Any]
CONTEXT, LENGTH = 131_072, 4096
HEADS_PER_GROUP = 16
"""Heads that share keys and values in Llama 3.1 405B: 128 heads, 8 groups (its report, Table 3)."""


def v3() -> ModelConfig:
    return preset("v3")


def _rounded(number: float) -> int:
    """To two significant digits."""
    return int(float(f"{number:.1e}"))


@cache
def shared() -> Values:
    """What sentences of several cards and experiments use: sizes of V3 and of the networks that were trained."""
    from bessemer_claims import machine, pretrain, pretrain_speed, results

    def smaller(cfg: ModelConfig) -> int:
        return _rounded(accounting.main_params(v3()) / accounting.main_params(cfg))

    reference = pretrain.network("ref", "claims")
    stored = results.committed().results
    copied = [run.metrics["copy"] for run in stored if run.shape == "claims" and run.arm in ("ref", "MHA")]
    solved = [run.metrics["pass@1"] for run in stored if run.part == "zero" and run.arm in ("base", "student", "mixed")]
    return {
        "smaller": smaller(reference), "smaller_rl": smaller(preset("tiny")), "routed": v3().n_routed_experts,
        "tokens": pretrain.shapes()["claims"].tokens, "context": CONTEXT,
        "most_tokens": int(pretrain.shapes()["claims"].tokens * max(arm.tokens for arm in pretrain.arms().values())),
        "experts": reference.n_routed_experts, "rounds": pretrain_speed.ROUNDS,
        "shallow": min(machine.DRAFTING.values()), "deep": v3().n_layers,
        "level": 100 * rules().confidence,
        "copied_low": 100 * min(copied), "copied_high": 100 * max(copied),
        "solved_low": 100 * min(solved), "solved_high": 100 * max(solved),
    }  # fmt: skip


def _experts() -> Values:
    cfg = v3()
    all_used = preset("v3", n_activated_experts=cfg.n_routed_experts, n_limited_groups=cfg.n_expert_groups)
    flops = accounting.flops_per_token(cfg, LENGTH).forward
    gate = 2 * (cfg.n_layers - cfg.n_dense_layers) * cfg.n_routed_experts * cfg.dim
    return {
        "shared": cfg.n_shared_experts, "routed": cfg.n_routed_experts, "inner": cfg.moe_inter_dim,
        "chosen": cfg.n_activated_experts, "stored": accounting.main_params(cfg) / 1e9,
        "active": accounting.active_params(cfg) / 1e9,
        "stored_ratio": accounting.main_params(cfg) / accounting.active_params(cfg),
        "work_ratio": accounting.flops_per_token(all_used, LENGTH).forward / flops, "gate": 100 * gate / flops,
    }  # fmt: skip


def _heads(cfg: ModelConfig) -> int:
    """Numbers in the keys and values of all heads, per layer and token."""
    return cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)


def _cache() -> Values:
    cfg = v3()
    latent, full = cfg.kv_lora_rank + cfg.qk_rope_head_dim, _heads(cfg)
    token = full * cfg.n_layers * 2
    return {
        "latent": latent, "mha": full, "share": 100 * latent / full, "mha_mb": token / 1e6,
        "context_gb": token * CONTEXT / 1e9, "context": CONTEXT, "gpu_gb": device("H800").memory,
        "fit": int(token * CONTEXT / 1e9 / device("H800").memory),
    }  # fmt: skip


def _without_cache() -> Values:
    """The cost if each of T tokens sends all before it through the network again, relative to a cache."""
    cfg, length = v3(), 1024
    again = sum(n * accounting.flops_per_token(cfg, n).forward for n in range(1, length + 1))
    return {"length": length, "ratio": again / (length * accounting.flops_per_token(cfg, length).forward)}


def _recompute() -> Values:
    """MB per token and forward passes per token, for a new token after LENGTH others, with ordinary attention."""
    cfg = v3()
    forward = accounting.flops_per_token(cfg, LENGTH).forward
    again = 2 * cfg.dim * _heads(cfg) * cfg.n_layers * LENGTH  # keys and values of all tokens from the kept inputs
    costs = {
        "none": (0.0, LENGTH), "inputs": (2 * cfg.dim * cfg.n_layers / 1e6, 1 + again / forward),
        "keys": (2 * _heads(cfg) * cfg.n_layers / 1e6, 1.0),
    }  # fmt: skip
    points = list(costs.values())
    groups = cfg.n_heads // HEADS_PER_GROUP  # as in Llama 3.1 405B; their projections also compute less
    grouped = (costs["keys"][0] / HEADS_PER_GROUP, 1.0)
    dominated, by_groups = (
        sum(any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in (*points, *more)) for b in points)
        for more in ((), (grouped,))
    )
    named = {name: size for name, (size, _) in costs.items()} | {
        f"{name}_work": work for name, (_, work) in costs.items()
    }
    named |= {"dominated": dominated, "groups": groups, "dominated_by_groups": by_groups - dominated}
    return named | {"length": LENGTH}


def nodes_touched(cfg: ModelConfig) -> float:
    """Mean number of nodes that a token goes to if it chooses its experts at random, without a limit."""
    experts, chosen = cfg.n_routed_experts, cfg.n_activated_experts
    others = experts - experts // cfg.n_expert_groups
    return cfg.n_expert_groups * (1 - math.comb(others, chosen) / math.comb(experts, chosen))


@cache
def _prediction() -> Values:
    cfg = v3()
    logits = LENGTH * cfg.vocab_size * 4 / 1e9
    heads = sum(slot.name.endswith("head.weight") and not slot.copy for slot in mapping.slots(cfg))
    plain, more = (accounting.flops_per_token(cfg, LENGTH, mtp=mtp).training / 1e9 for mtp in (False, True))
    return {
        "modules": cfg.n_mtp, "heads": heads, "one": logits, "naive": 4 * logits, "growth": 4 * logits / logits,
        "without": plain, "with_": more,
        "more": 100 * (more / plain - 1), "length": LENGTH,
    }  # fmt: skip


def _kept() -> Values:
    cfg = v3()
    fp8 = activations.layer_activation_bytes(cfg, False, fp8=True) / 1e3
    bf16 = activations.layer_activation_bytes(cfg, False, fp8=False, fused=True) / 1e3
    return {"fp8": fp8, "bf16": bf16, "share": 100 * fp8 / bf16}


@cache
def _released() -> Values:
    """Bytes of the weights on disk, tensor by tensor: FP8 with a float32 scale per block, or BF16."""
    slots = mapping.slots(v3())
    size = 0
    for slot in slots:
        numbers = math.prod(slot.shape)
        if slot.fp8:
            size += numbers + 4 * math.prod(-(-side // TILE) for side in slot.shape)
        else:
            size += numbers * (4 if slot.name.endswith("bias_E") else 2)
    stored = sum(math.prod(slot.shape) for slot in slots)
    bf16, masters = 2 * stored / 1e9, 4 * stored / 1e9
    return {
        "released": size / 1e9, "bf16": bf16, "masters": masters, "released_share": 100 * size / 1e9 / bf16,
        "masters_share": 100 * masters / bf16,
    }  # fmt: skip


def _layout() -> Values:
    layout = setup(published("v3"), v3(), parse_cluster("2048xH800")).layout
    return {"pp": layout.pp, "ep": layout.ep, "dp": layout.dp, "gpus": layout.world, "nodes": layout.ep // layout.node}


def _pipeline() -> Values:
    ranks, micro = 8, 20

    def idle(name: str, costs: Costs) -> float:
        return max(simulate(schedule(name, ranks, micro), costs).idle)

    equal = Costs(1, 1, 1)
    times = {"one_f_one_b": idle("1f1b", equal), "zb1p": idle("zb1p", equal), "dualpipe": idle("dualpipe", equal)}
    overlapped = idle("dualpipe", Costs(1, 1, 1, 2.5))
    ratio = times["dualpipe"] / times["one_f_one_b"]
    return times | {"overlapped": overlapped, "dualpipe_ratio": ratio, "ranks": ranks, "micro": micro}


def _messages() -> Values:
    cfg = v3()
    bf16, fp8 = 2 * cfg.dim, cfg.dim + 4 * (cfg.dim // TILE)
    free = nodes_touched(cfg)
    return {
        "fp8": fp8,
        "bf16": bf16,
        "free": free,
        "limit": cfg.n_limited_groups,
        "share": 100 * fp8 * cfg.n_limited_groups / (bf16 * free),
    }


def _links() -> Values:
    _, dispatch, combine = efficiency()["exchange"]["network"][-1]
    return {"use": 100 * min(dispatch, combine) / device("H800").network}


def _critic() -> Values:
    stored = accounting.main_params(v3()) / 1e9
    return {"critic": stored, "doubled": (stored + stored) / stored}


def _hours() -> Values:
    table = read_toml("reports.toml")
    total, price = table["hours"]["value"], 2.0
    bill = total * price / 1000
    return {
        "share": 100 * table["pretraining"]["value"] / total, "zero": 100 * table["r1_zero"]["value"] / total,
        "bill": bill, "limit_price": 6000 / total,
    }  # fmt: skip


def _against_gpt4() -> Values:
    return {name: estimate / _hours()["bill"] for name, estimate in _figures("K7").items()}


def _against_meta() -> Values:
    """6 N D over GPU hours: Meta's dense 405B network against V3."""
    runs = {run["name"]: run for run in read_toml("reference.toml")["run"]}
    llama, deepseek = runs["Llama 3.1 405B"], runs["DeepSeek-V3"]
    params, tokens, hours = (llama[key] / deepseek[key] for key in ("active", "tokens", "hours"))
    return {
        "hours": hours,
        "work": params * tokens,
        "params": params,
        "tokens": tokens,
        "use": hours / (params * tokens),
    }


def _figures(name: str) -> dict[str, float]:
    return claims()[name].figures


def _aime() -> Values:
    aime = claims()["H1"].scores[0]
    low, high = wilson(aime.other / 100, aime.problems)
    return {"aime": 100 * (high - low) / 2}


def _base() -> Values:
    base = _figures("G7")
    low, high = wilson(base["base"] / 100, base["problems"])
    return {"low": 100 * low, "high": 100 * high}


def _peak() -> Values:
    on = device("H800")
    assert on.fp8 is not None, "an H800 has FP8"
    return {"peak": on.fp8 / on.bf16}


COMPUTED: dict[str, Callable[[], Values]] = {
    "H1": _aime, "H12": _hours,
    **dict.fromkeys(("M1", "M5", "M12", "M13", "M17", "M21", "K8"), _experts),
    "M10": lambda: {"free": nodes_touched(v3()), "groups": v3().n_expert_groups},
    "L4": _cache, "L5": _cache, "L9": _without_cache, "L10": _recompute,
    **dict.fromkeys(("T2", "T8", "T9", "T12"), _prediction), "F3": _kept, "F4": _peak, "F12": _released,
    "P1": _layout, "P2": _pipeline, "P4": _messages, "P5": _links, "G3": _critic,
    "L11": lambda: {f"{name}_ratio": _figures("L11")[name] / _figures("L11")["v3"] for name in ("qwen", "llama")},
    "G5": lambda: {"share": 100 * _figures("G5")["tuning"] / _figures("G5")["whole"]},
    "G7": _base, "Z11": lambda: {"share": _hours()["zero"]}, "K2": _hours, "K5": _against_meta,
    "R4": lambda: {"samples": int(sum(_figures("R4").values()))},
    "K6": lambda: {"prices": 100 * _figures("K6")["r1"] / _figures("K6")["o1"]}, "K7": _against_gpt4,
}  # fmt: skip
