"""Cases of YaRN, rotary products and latent attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival, integers
from bessemer_vectors.exact import log, power
from bessemer_vectors.reference import positions as reference

Outputs = dict[str, Any]
V3 = {
    "dim": 64,
    "base": 10000.0,
    "factor": 40.0,
    "original_length": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "head_dim": 192,
}


def yarn() -> list[Case]:
    def plain_scale(head_dim: int, **rest: Any) -> Outputs:
        return {"softmax_scale": 1 / math.sqrt(head_dim)}

    def once(head_dim: int, factor: float, mscale_all_dim: float, **rest: Any) -> Outputs:
        m = 0.1 * mscale_all_dim * log(factor) + 1
        return {"softmax_scale": m / math.sqrt(head_dim)}

    def of_rope_only(dim: int, **rest: Any) -> Outputs:
        return {"softmax_scale": reference.yarn(**(rest | {"dim": dim, "head_dim": dim}))["softmax_scale"]}

    def in_tables(factor: float, mscale: float, head_dim: int, **rest: Any) -> Outputs:
        """The temperature on cos and sin, none in the softmax (transformers without mscale_all_dim)."""
        return {"table_scale": 0.1 * mscale * log(factor) + 1, "softmax_scale": 1 / math.sqrt(head_dim)}

    def interpolated(dim: int, base: float, factor: float, **rest: Any) -> Outputs:
        return {"inv_freq": np.array([power(base, -2 * j / dim) / factor for j in range(dim // 2)])}

    def unrounded(
        dim: int, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float, **rest: Any
    ) -> Outputs:
        """Corrections without floor and ceil (`truncate: false`)."""
        low, high = (
            dim * log(original_length / (2 * math.pi * turns)) / (2 * log(base)) for turns in (beta_fast, beta_slow)
        )
        out = []
        for j in range(dim // 2):
            f, ramp = power(base, -2 * j / dim), min(max((j - low) / (high - low), 0.0), 1.0)
            out.append(f * (1 - ramp) + f / factor * ramp)
        return {"inv_freq": np.array(out)}

    def unbounded(
        dim: int, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float, **rest: Any
    ) -> Outputs:
        """Corrections that are not kept between 0 and dim - 1."""
        low, high = (
            rounded(dim * log(original_length / (2 * math.pi * turns)) / (2 * log(base)))
            for rounded, turns in ((math.floor, beta_fast), (math.ceil, beta_slow))
        )
        out = []
        for j in range(dim // 2):
            f, ramp = power(base, -2 * j / dim), min(max((j - low) / (high - low), 0.0), 1.0)
            out.append(f * (1 - ramp) + f / factor * ramp)
        return {"inv_freq": np.array(out)}

    square = Rival(
        "no temperature", "softmax_scale = head_dim^-0.5", "YaRN left out of the softmax", function=plain_scale
    )
    single = Rival("m once", "head_dim^-0.5 m", "m in place of m^2", function=once)
    tables = Rival(
        "temperature in the tables",
        "table_scale = m, softmax_scale = head_dim^-0.5",
        "YaRN's own form",
        function=in_tables,
    )
    linear = Rival("linear interpolation", "inv_freq = f / s", "position interpolation", function=interpolated)
    smooth = Rival(
        "unrounded corrections", "without floor and ceil", "another convention (truncate: false)", function=unrounded
    )
    return [
        Case(
            "DeepSeek-V3",
            "Corrections 10 and 23; softmax scale 0.1352.",
            V3,
            (
                square,
                single,
                tables,
                linear,
                smooth,
                Rival("scale of the rotary part", "64^-0.5 m^2", "a wrong head size", function=of_rope_only),
            ),
        ),
        Case(
            "DeepSeek-V2-Lite",
            "mscale and mscale_all_dim 0.707.",
            V3 | {"mscale": 0.707, "mscale_all_dim": 0.707},
            (
                square,
                single,
                Rival("mscale 1", "V3's temperature", "another model", {"mscale": 1.0, "mscale_all_dim": 1.0}),
            ),
        ),
        Case("no mscale_all_dim", "The temperature stands in the tables.", V3 | {"mscale_all_dim": 0.0}),
        Case(
            "small",
            "Sixteen dimensions, four times a length of 64.",
            V3 | {"dim": 16, "factor": 4.0, "original_length": 64, "beta_fast": 8.0, "head_dim": 48},
            (single, linear, smooth),
        ),
        Case(
            "ramp from 0",
            "No pair turns 32 times over a length of 64: the ramp begins at pair 0, not below.",
            V3 | {"dim": 16, "base": 20.0, "factor": 1.5, "original_length": 64, "head_dim": 48},
            (linear, Rival("unbounded ramp", "floor c(fast) < 0", "a missing bound", function=unbounded)),
        ),
        Case(
            "ramp to the end",
            "Every pair turns more than once: the ramp ends at dim - 1.",
            V3 | {"dim": 16, "base": 20.0, "factor": 4.0, "beta_fast": 512.0, "head_dim": 48},
            (linear, Rival("unbounded ramp", "ceil c(slow) > dim - 1", "a missing bound", function=unbounded)),
        ),
    ]


def rope_scores() -> list[Case]:
    draw = Draw(30)
    q, k = draw.numbers(-1, 1, 5, 8), draw.numbers(-1, 1, 5, 8)
    inv_freq = np.array([1.0, 0.1, 0.01, 0.001])
    far = integers(0, 1, 2, 100, 4000)

    def case(name: str, why: str, positions: Any, pairs: str) -> Case:
        other = "halves" if pairs == "interleaved" else "interleaved"
        rivals = (
            Rival(f'pairs "{other}"', "the other pairing", "another convention", {"pairs": other}),
            Rival("positions from 1 for keys alone", "k at position + 1", "an offset of 1", function=shifted),
        )
        inputs = {"q": q, "k": k, "positions": positions, "inv_freq": inv_freq, "pairs": pairs}
        return Case(name, why, inputs, rivals)

    def shifted(q: Any, k: Any, positions: Any, inv_freq: Any, pairs: str) -> Outputs:
        turned_q = [
            reference.rotated(row.tolist(), int(p), inv_freq, pairs) for row, p in zip(q, positions, strict=True)
        ]
        turned_k = [
            reference.rotated(row.tolist(), int(p) + 1, inv_freq, pairs) for row, p in zip(k, positions, strict=True)
        ]
        return {"scores": np.array([[reference.dot(a, b) for b in turned_k] for a in turned_q])}

    return [
        case("interleaved", "DeepSeek's pairs.", np.arange(5), "interleaved"),
        case("interleaved, far apart", "Only differences of positions count.", far, "interleaved"),
        case("halves", "Llama's pairs in transformers.", np.arange(5), "halves"),
    ]


def mla() -> list[Case]:
    draw = Draw(31)
    T, D, Q, C, H, n, r, v = 6, 8, 6, 5, 2, 4, 4, 3
    sizes = {
        "q_down": (Q, D),
        "q_up": (H * (n + r), Q),
        "kv_down": (C + r, D),
        "kv_up": (H * (n + v), C),
        "out": (D, H * v),
    }
    plain: dict[str, Any] = {"x": draw.numbers(-1, 1, T, D), "segments": np.zeros(T, dtype=np.int64)}
    plain |= {name: draw.numbers(-0.6, 0.6, *shape) for name, shape in sizes.items()}
    plain |= {"q_norm": draw.numbers(0.5, 1.5, Q), "kv_norm": draw.numbers(0.5, 1.5, C)}
    plain |= {
        "heads": H,
        "nope": n,
        "rope": r,
        "value": v,
        "inv_freq": np.array([1.0, 0.01]),
        "softmax_scale": 1 / math.sqrt(n + r),
        "eps": 1e-6,
        "form": "expanded",
    }
    direct = plain | {
        "q_down": np.zeros((0, D)),
        "q_norm": np.zeros(0),
        "q_up": draw.numbers(-0.6, 0.6, H * (n + r), D),
    }
    packed = plain | {"segments": integers(0, 0, 1, 1, 1, 1)}

    def unnormed(**inputs: Any) -> Outputs:
        """The equations as printed, without norms on the latents."""
        normed, reference.normed = reference.normed, lambda x, gain, eps: list(x)
        try:
            return reference.mla(**inputs)
        finally:
            reference.normed = normed

    def halves(**inputs: Any) -> Outputs:
        turn = reference.rotated
        reference.rotated = lambda x, position, inv_freq, pairs: turn(x, position, inv_freq, "halves")
        try:
            return {"output": reference.mla(**inputs)["output"]}
        finally:
            reference.rotated = turn

    def unrotated(**inputs: Any) -> Outputs:
        return {"output": reference.mla(**(inputs | {"inv_freq": np.zeros(2)}))["output"]}

    def exchanged(**inputs: Any) -> Outputs:
        """Per head values first, then keys."""
        parts = [np.split(block, [v]) for block in np.split(inputs["kv_up"], H)]
        swapped = np.concatenate([np.concatenate([keys, values]) for values, keys in parts])
        return {"output": reference.mla(**(inputs | {"kv_up": swapped}))["output"]}

    def whole_norm(**inputs: Any) -> Outputs:
        """The norm over latent and rotary key together."""
        rows = []
        for row in inputs["x"]:
            down = reference.times(inputs["kv_down"], row.tolist())
            rows.append(reference.normed(down, np.ones(C + r), inputs["eps"])[:C])
        return {"latent": np.array(rows) * inputs["kv_norm"]}

    printed = Rival(
        "no latent norms", "the equations of V2 2.1 as printed", "the reports' equations", function=unnormed
    )
    rivals = (
        printed,
        Rival("rotary pairs by halves", "(j, j + r/2)", "Llama's layout", function=halves),
        Rival("no rotation", "positions do not count", "a slip", function=unrotated),
        Rival("scale of the plain part", "n^-0.5", "a forgotten rotary part", {"softmax_scale": 0.5}),
        Rival("values before keys", "kv_up per head: values, keys", "another layout", function=exchanged),
        Rival("norm over the rotary key too", "norm([c; k])[:C]", "another layout", function=whole_norm),
    )
    crossing = Rival(
        "samples see each other", "causal mask alone", "a missing mask", {"segments": np.zeros(T, dtype=np.int64)}
    )
    return [
        Case("expanded", "Keys and values of every head are built from the latents.", plain, rivals),
        Case(
            "absorbed",
            "The same weights, attention over the latents: the same result.",
            plain | {"form": "absorbed"},
            rivals,
        ),
        Case("no query compression", "V2-Lite: queries straight from x.", direct, (printed,)),
        Case(
            "small activations",
            "A row near 0, where the epsilon inside the root of both norms counts.",
            plain | {"x": np.where(np.arange(T)[:, None] == 3, np.round(plain["x"] * 0.002, 5), plain["x"])},
            (
                Rival("no epsilon", "x / sqrt(mean(x^2))", "a slip", {"eps": 0.0}),
                Rival("epsilon 1e-5", "another epsilon", "another model", {"eps": 1e-5}),
            ),
        ),
        Case("packed", "Two samples in a row, positions from 0 in each.", packed, (crossing, printed)),
        Case("packed, absorbed", "The same, over the latents.", packed | {"form": "absorbed"}, (crossing,)),
    ]
