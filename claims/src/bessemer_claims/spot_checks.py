"""What takes a second to check: small parts of the real system, run on this machine while the page is made."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bessemer.addons.accelerate.precision import fp8_linear
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.data.tokenizer import SMALLEST, Tokenizer
from bessemer.engine.engine import Engine
from bessemer.hf import mapping
from bessemer.model.config import preset
from bessemer.model.gate import Gate
from bessemer.model.transformer import Transformer
from bessemer.rl.algorithms.grpo import compared as group_advantages
from bessemer_claims.exact import Values, nodes_touched, v3


def _gate() -> Values:
    """V3's gate with random weights, on random tokens: the most nodes that one token uses."""
    cfg, tokens = v3(), 1024
    generator = torch.Generator().manual_seed(0)
    gate = Gate(cfg)
    with torch.no_grad():
        gate.weight.normal_(0, cfg.init_std, generator=generator)
        experts_NK = gate.choose(gate.scores(torch.randn(tokens, cfg.dim, generator=generator)))
    nodes_NK = experts_NK // (cfg.n_routed_experts // cfg.n_expert_groups)
    touched = max(len(set(row)) for row in nodes_NK.tolist())
    return {"tokens": tokens, "touched": touched, "limit": cfg.n_limited_groups, "free": nodes_touched(cfg)}


def _processor() -> Values:
    """Forward and backward of a network with experts on the CPU."""
    cfg = preset("tiny")
    model = Transformer(cfg).initialise(0)
    model.train_outputs(torch.zeros(1, 32, dtype=torch.int64)).hidden_BTD.sum().backward()
    trained = any(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)
    return {"experts": cfg.n_routed_experts, "special": 0 if trained else 1}


def _fp8() -> Values:
    """The three products of a linear layer, with the formats of their operands and results."""
    generator = torch.Generator().manual_seed(0)
    x, dy, w = (torch.randn(128, 128, generator=generator).bfloat16() for _ in range(3))
    operand, gradient, weight = PAPER.quantised(x), PAPER.quantised_gradient(dy), PAPER.quantised_weight(w)
    results = (
        fp8_linear.forward(operand, w, PAPER), fp8_linear.input_gradient(gradient, w, PAPER),
        fp8_linear.weight_gradient(gradient, operand, PAPER),
    )  # fmt: skip
    pairs = ((operand, weight), (gradient, weight), (gradient, operand))
    in_fp8 = sum(all(tensors[0].dtype == torch.float8_e4m3fn for tensors in pair) for pair in pairs)
    excluded = ("embed", "head", "gate", "norm", "eh_proj")
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in results]
    return {
        "products": len(pairs), "in_fp8": in_fp8,
        "outside": sum(any(word in name for word in excluded) for name in mapping.FP8),
        "output": dtypes[0], "gradient": dtypes[2],
        "wide": sum(dtypes[position] in ("bfloat16", "float32") for position in (0, 2)),
    }  # fmt: skip


def _guesses() -> Values:
    """A network with random weights answers with and without the guesses of its own MTP module."""
    tokenizer = Tokenizer.train(["Use 3, 4, 6 to make 18."], SMALLEST)
    engine = Engine(Transformer(preset("tiny", vocab_size=tokenizer.vocab_size)).initialise(0).eval(), tokenizer)
    prompts = ["Use 3, 4, 6 to make 18.", "make 4", "6, 3"]
    plain, guessed = (
        engine.generate(prompts, drafts=drafts, temperature=0.0, max_new_tokens=48, stop_ids=[]) for drafts in (0, 3)
    )
    pairs = [
        (a, b)
        for [answer], [other] in zip(plain, guessed, strict=True)
        for a, b in zip(answer.tokens, other.tokens, strict=True)
    ]
    return {"compared": len(pairs), "different": sum(a != b for a, b in pairs)}


def _group() -> Values:
    first, *others = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0].tolist()
    return {"first": first, "others": others[0]}


CHECKS: dict[str, Callable[[], Values]] = {
    "M10": _gate, "M18": _processor, "F1": _fp8, "F2": _fp8, "T3": _guesses, "G2": _group
}  # fmt: skip
