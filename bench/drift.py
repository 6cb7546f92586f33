r"""Faults planted in one of two sides, and where `bessemer drift` finds them.

    python bench/drift.py --json bench/results/drift.json
    python bench/drift.py --length 8192 --seeds 1 --only "healthy|RoPE|bias missing|another head" \
        --json bench/results/drift_long.json
    python bench/drift.py --peers llama.cpp --json bench/results/drift_llama_cpp.json

Random networks of three families (ours with MLA and experts, Llama, Qwen3-MoE), three seeds each, all weights BF16
numbers. Each fault is a model directory of its own that differs from the healthy one in one thing. Two pairs for each:
the trainer with the healthy directory against transformers and against the engine with the faulty one, in float32 and
in BF16. With llama.cpp (`bessemer[llama]`) our network is the file that `bessemer convert` writes, Llama is written
here; Qwen3-MoE is left out. What counts: the first layer and part that the command names. A fault is

    right     named at its layer and part. Our engine's fused kernels show the stream after each half layer, so there
              attention is "after attention", MLP is "residual stream", and an embedding is the first stream
    elsewhere named at another one
    unseen    not beyond rounding

Healthy pairs must not be named at all.
"""

# ruff: noqa: E402  (the path is fixed between imports)
from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
import transformers
from machine import processor
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # llama_cpp.py here is a benchmark
sys.path.insert(0, str(HERE.parent / "tests" / "shared"))
from planted_models import as_released, changed, noisy

from bessemer.addons.evals.drift_run import TEXT, drift
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

K = 2
"""The layer with the fault, of 4."""
OWN = dict(
    vocab_size=512, dim=64, n_layers=4, n_dense_layers=1, inter_dim=128, moe_inter_dim=32, n_heads=4, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=16,
    n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, n_mtp=0, init_std=0.1,
)  # fmt: skip
OTHER = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, head_dim=16)


class Fault(NamedTuple):
    """What differs: tensors by a pattern of their names, or keys of config.json; and where it must be found."""

    layer: int
    part: str
    tensors: dict[str, Callable[[Tensor], Tensor]] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012


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


def healthy(family: str, seed: int, longest: int, folder: Path) -> Path:
    """A model directory."""
    if family == "own":
        model: Any = Transformer(ModelConfig.make(OWN | {"max_seq_len": longest})).initialise(seed).eval()
        Tokenizer.train([TEXT] * 4, 400).save(folder.parent / "tokenizer")  # a GGUF file has one
        as_released(model, seed).save(folder, tokenizer_dir=folder.parent / "tokenizer")
        return folder
    house = "Llama" if family == "llama" else "Qwen3Moe"
    torch.manual_seed(seed)
    shape = OTHER | {"max_position_embeddings": longest} | ({} if family == "llama" else EXPERTS)
    model = getattr(transformers, f"{house}ForCausalLM")(getattr(transformers, f"{house}Config")(**shape))
    as_released(model, seed).save_pretrained(folder)
    return folder


def llama_gguf(directory: Path, file: Path) -> Path:
    """A directory of Llama in float32 without a tokenizer. Its rotary pairs are neighbours there."""
    config, stored = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    L, heads, groups = (
        config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads")
    )  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(L)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, tensor in stored.items():
        for projection, n in (("q_proj", heads), ("k_proj", groups)):
            if projection in name:
                tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=["transformers", "engine"], help="who has the faulty one")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--length", type=int, default=160, help="ids of the row")
    parser.add_argument("--only", default="", metavar="REGEX", help="faults with such a name; one is called healthy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows, counts = [], Counter()
    for family, faults in FAULTS.items():
        if family == "qwen3-moe" and args.peers == ["llama.cpp"]:
            continue
        for seed in args.seeds:
            ids = torch.randint(2, 512, (args.length,), generator=torch.Generator().manual_seed(seed)).tolist()
            with tempfile.TemporaryDirectory() as scratch:
                right = healthy(family, seed, max(512, args.length), Path(scratch) / "healthy")
                for n, (name, fault) in enumerate({"healthy": None, **faults}.items()):
                    if not re.search(args.only, name):
                        continue
                    wrong = right
                    if fault is not None:
                        wrong = changed(right, Path(scratch) / str(n), fault.tensors, **fault.config)
                    for dtype in args.dtypes:
                        for peer in args.peers:
                            held = wrong
                            if family == "llama" and peer == "llama.cpp":
                                held = llama_gguf(wrong, Path(scratch) / f"{n}.gguf")
                            result = drift(("trainer", right), (peer, held), ids, dtype)
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
                                     at=at, sentence=result.sentence(), most_held=result.most_held)
                            )  # fmt: skip
                            if verdict not in ("right", "agree"):
                                print(family, seed, name, dtype, peer, verdict, at, flush=True)
    for (family, dtype, verdict), count in sorted(counts.items()):
        print(f"{family:10} {dtype:9} {verdict:11} {count}")
    if args.json:
        packages = ["torch", "transformers"] + ["llama-cpp-python"] * ("llama.cpp" in args.peers)
        versions = {name: version(name) for name in packages}
        table = [{"family": a, "dtype": b, "verdict": c, "count": n} for (a, b, c), n in sorted(counts.items())]
        facts = {"machine": processor(), "versions": versions, "ids": args.length, "table": table, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
