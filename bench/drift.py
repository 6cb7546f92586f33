"""Faults planted in one of two sides, and where `bessemer drift` finds them.

    python bench/drift.py --json bench/results/drift.json

Random networks of three families (ours with MLA and experts, Llama, Qwen3-MoE), three seeds each, all weights BF16
numbers. Each fault is a model directory of its own that differs from the healthy one in one thing. Two pairs for each:
the trainer with the healthy directory against transformers and against the engine with the faulty one, in float32 and
in BF16. What counts: the first layer and part that the command names. A fault is

    right     named at its layer and part. Our engine's fused kernels show the stream after each half layer, so there
              attention is "after attention", MLP is "residual stream", and an embedding is the first stream
    elsewhere named at another one
    unseen    not beyond rounding

Healthy pairs must not be named at all.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from machine import processor
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.addons.evals.drift_run import drift
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

SEEDS, LENGTH, K = (1, 2, 3), 160, 2
"""K: the layer with the fault, of 4."""
OWN = dict(
    vocab_size=512, dim=64, n_layers=4, n_dense_layers=1, inter_dim=128, moe_inter_dim=32, n_heads=4, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=16,
    n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, n_mtp=0, max_seq_len=512, init_std=0.1,
)  # fmt: skip
OTHER = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, head_dim=16)


class Fault(NamedTuple):
    """What differs: tensors by a pattern of their names, or keys of config.json; and where it must be found."""

    layer: int
    part: str
    tensors: dict[str, Callable[[Tensor], Tensor]] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012


def noisy(tensor: Tensor) -> Tensor:
    """Every number by a random 30 % more or less."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))
    return tensor.float() * (1 + 0.3 * noise)


def adapter(tensor: Tensor) -> Tensor:
    """The matrix with an adapter of rank 2, a fifth of its norm, merged: the other side has not merged it."""
    a, b = (torch.randn(n, 2, generator=torch.Generator().manual_seed(7)) for n in tensor.shape)
    low = a @ b.T
    return tensor.float() + 0.2 * tensor.float().norm() / low.norm() * low


def swapped(tensor: Tensor) -> Tensor:
    return tensor.float().roll(1, 0)


def rope(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


COMMON = {
    "attention's output matrix perturbed": Fault(K, "attention", {rf"layers\.{K}\.self_attn\.o_proj": noisy}),
    "adapter of the output matrix not merged": Fault(K, "attention", {rf"layers\.{K}\.self_attn\.o_proj": adapter}),
    "norm before the FFN of layer 0 perturbed": Fault(0, "MLP", {r"layers\.0\.post_attention_layernorm": noisy}),
    "embedding perturbed": Fault(-1, "embedding", {"embed_tokens": noisy}),
    "final norm perturbed": Fault(4, "final norm", {r"model\.norm\.weight": noisy}),
    "another head, as if tied": Fault(4, "log-probs", {"lm_head": swapped}),
    "RoPE base 100 for 10,000": Fault(0, "attention", {}, rope(100.0)),
    "norm epsilon 0.1": Fault(0, "attention", {}, {"rms_norm_eps": 0.1}),
}
FAULTS = {
    "own": COMMON | {
        "the gate's bias missing": Fault(K, "router", {rf"layers\.{K}\.mlp\.gate\.e_score": torch.zeros_like}),
        "gate perturbed": Fault(K, "router", {rf"layers\.{K}\.mlp\.gate\.weight": noisy}),
        "experts' signs": Fault(K, "MLP", {rf"layers\.{K}\.mlp\.experts\.\d+\.down_proj": torch.neg}),
        "dense FFN perturbed": Fault(0, "MLP", {r"layers\.0\.mlp\.down_proj": noisy}),
    },
    "llama": COMMON | {
        "keys perturbed": Fault(K, "attention", {rf"layers\.{K}\.self_attn\.k_proj": noisy}),
        "FFN perturbed": Fault(K, "MLP", {rf"layers\.{K}\.mlp\.down_proj": noisy}),
        "adapter of the FFN not merged": Fault(K, "MLP", {rf"layers\.{K}\.mlp\.up_proj": adapter}),
    },
    "qwen3-moe": {name: fault for name, fault in COMMON.items() if "layer 0" not in name} | {
        "gate perturbed": Fault(K, "router", {rf"layers\.{K}\.mlp\.gate\.": noisy}),
    },
}  # fmt: skip
FUSED = {"attention": "after attention", "MLP": "residual stream", "embedding": "after attention"}


@torch.no_grad()
def healthy(family: str, seed: int, folder: Path) -> Path:
    """A model directory: gains off 1, biases of the gate off 0, all numbers in BF16."""
    if family == "own":
        model: Any = Transformer(ModelConfig.make(OWN)).initialise(seed).eval()
    else:
        house = "Llama" if family == "llama" else "Qwen3Moe"
        torch.manual_seed(seed)
        config = getattr(transformers, f"{house}Config")(**OTHER | ({} if family == "llama" else EXPERTS))
        model = getattr(transformers, f"{house}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias_E"):
            tensor.uniform_(-0.3, 0.3, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        tensor.copy_(tensor.bfloat16())
    (model.save if family == "own" else model.save_pretrained)(folder)
    return folder


def planted(source: Path, target: Path, fault: Fault) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            stored = load_file(file)
            for pattern, change in fault.tensors.items():
                hits = [name for name in stored if re.search(pattern, name)]
                assert hits, pattern
                stored |= {name: change(stored[name]).to(stored[name].dtype).contiguous() for name in hits}
            save_file(stored, target / file.name, {"format": "pt"})
        elif file.name == "config.json":
            values = json.loads(file.read_text())
            known = {key: value for key, value in fault.config.items() if key in values}
            assert known or not fault.config
            (target / file.name).write_text(json.dumps(values | known))
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows, counts = [], Counter()
    for family, faults in FAULTS.items():
        for seed in SEEDS:
            ids = torch.randint(2, 512, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()
            with tempfile.TemporaryDirectory() as scratch:
                right = healthy(family, seed, Path(scratch) / "healthy")
                for n, (name, fault) in enumerate({"healthy": None, **faults}.items()):
                    wrong = right if fault is None else planted(right, Path(scratch) / str(n), fault)
                    for dtype in ("float32", "bfloat16"):
                        for peer in ("transformers", "engine"):
                            result = drift(("trainer", right), (peer, wrong), ids, dtype)
                            at = None if result.first is None else tuple(result.first.point)
                            if fault is None:
                                verdict = "agree" if at is None else "false alarm"
                            else:
                                fused = family == "own" and peer == "engine"
                                part = FUSED.get(fault.part, fault.part) if fused else fault.part
                                wanted = max(0, fault.layer) if fused else fault.layer, part
                                verdict = "unseen" if at is None else "right" if at == wanted else "elsewhere"
                            counts[family, dtype, verdict] += 1
                            rows.append(
                                dict(family=family, seed=seed, fault=name, dtype=dtype, peer=peer, verdict=verdict,
                                     at=at, sentence=result.sentence())
                            )  # fmt: skip
                            if verdict not in ("right", "agree"):
                                print(family, seed, name, dtype, peer, verdict, at, flush=True)
    for (family, dtype, verdict), count in sorted(counts.items()):
        print(f"{family:10} {dtype:9} {verdict:11} {count}")
    if args.json:
        versions = {name: version(name) for name in ("torch", "transformers")}
        table = [{"family": a, "dtype": b, "verdict": c, "count": n} for (a, b, c), n in sorted(counts.items())]
        facts = {"machine": processor(), "versions": versions, "table": table, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
