"""What a GGUF file of architecture `deepseek2` says about a model: shape, routing, tokenizer, chat template.

What llama.cpp would compute differently or not load is refused here (`check_shape`, `check_split`: by the sources that
llama-cpp-python 0.3.36 builds); nothing is approximated. `gguf_writer` writes the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.hf.reader import read_json
from bessemer.model.config import ModelConfig

ARCH = "deepseek2"
KINDS = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
"""Name of the number format, and what the file as a whole is called."""
GATING = {"softmax": 1, "sigmoid": 2}
SAMPLING = {"temperature": "general.sampling.temp", "top_p": "general.sampling.top_p"}
MAX_LAYERS, MAX_EXPERTS = 512, 1024
LITE_LAYERS = {26, 27}
"""A file with so many layers is read as V2-Lite or one like it, whose queries are not compressed."""
BETAS = (32.0, 1.0)
"""beta_fast and beta_slow, which llama.cpp does not read for this architecture."""

# The pre-split that llama.cpp calls deepseek-v3, as in a tokenizer.json of V3 or of our own.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens. CONTROL is text inside a text and decodes to nothing; USER_DEFINED is one id wherever it stands."""
ENDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def check_shape(cfg: ModelConfig, where: str) -> None:
    """UserError for a network that llama.cpp's deepseek2 would compute differently or not load."""
    sparse = cfg.n_dense_layers < cfg.n_layers
    lite = cfg.n_layers in LITE_LAYERS or (cfg.n_layers, cfg.vocab_size) == (48, 128256)  # the latter: Kanana-2
    temperatures = f"mscale {cfg.mscale:g} and mscale_all_dim {cfg.mscale_all_dim:g}"
    betas = f"beta_fast {cfg.beta_fast:g} and beta_slow {cfg.beta_slow:g}"
    found = {
        f"YaRN with {temperatures}; llama.cpp takes one number, not 0, for both":
            cfg.yarn and (cfg.mscale != cfg.mscale_all_dim or not cfg.mscale),
        f"YaRN with {betas}; llama.cpp always takes {BETAS[0]:g} and {BETAS[1]:g}":
            cfg.yarn and (cfg.beta_fast, cfg.beta_slow) != BETAS,
        f"compressed queries in {cfg.n_layers} layers; llama.cpp takes a model of so many for V2-Lite, which has none":
            lite and cfg.q_lora_rank > 0,
        "expert layers without shared experts; llama.cpp needs one": sparse and cfg.n_shared_experts == 0,
        "groups rated by their best expert (group_limited_greedy); llama.cpp rates them by their two best":
            sparse and _limited(cfg) and cfg.topk_method == "group_limited_greedy",
        "route_scale 0, which llama.cpp reads as 1": sparse and cfg.route_scale == 0,
        f"{cfg.n_layers} layers; llama.cpp holds {MAX_LAYERS}": cfg.n_layers > MAX_LAYERS,
        f"{cfg.n_routed_experts} experts; llama.cpp holds {MAX_EXPERTS}":
            sparse and cfg.n_routed_experts > MAX_EXPERTS,
    }  # fmt: skip
    for words, holds in found.items():
        if holds:
            raise UserError(f"{where} has {words}. It cannot be written as GGUF; serve it with vLLM or SGLang instead")


def _limited(cfg: ModelConfig) -> bool:
    """Whether the choice of experts is limited to some groups."""
    return cfg.topk_method != "greedy" and cfg.n_limited_groups < cfg.n_expert_groups


def general(directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What the file says about itself, and the sampling that generation_config.json advises."""
    facts = {
        "general.architecture": ARCH, "general.type": "model", "general.name": directory.resolve().name,
        "general.file_type": KINDS[dtype][1], "general.quantization_version": 2,
    }  # fmt: skip
    path = directory / "generation_config.json"
    advised = read_json(path) if path.is_file() else {}
    if advised.get("do_sample"):
        facts |= {theirs: float(advised[ours]) for ours, theirs in SAMPLING.items() if advised.get(ours) is not None}
    return facts


def shape(cfg: ModelConfig) -> dict[str, Any]:
    """Sizes and rules of the network. Keys and values are those of the absorbed form: one head for all queries, as wide
    as the latent; the `_mla` lengths are the heads' own."""
    sparse = cfg.n_dense_layers < cfg.n_layers
    facts = {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.max_seq_len,
        "embedding_length": cfg.dim,
        "block_count": cfg.n_layers,
        "leading_dense_block_count": cfg.n_dense_layers,
        "feed_forward_length": cfg.inter_dim,
        "attention.head_count": cfg.n_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "attention.q_lora_rank": cfg.q_lora_rank,
        "attention.kv_lora_rank": cfg.kv_lora_rank,
        "attention.key_length": cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        "attention.value_length": cfg.kv_lora_rank,
        "attention.key_length_mla": cfg.qk_head_dim,
        "attention.value_length_mla": cfg.v_head_dim,
        "rope.dimension_count": cfg.qk_rope_head_dim,
        "rope.freq_base": cfg.rope_theta,
        "rope.scaling.type": "yarn" if cfg.yarn else "none",
        "expert_feed_forward_length": cfg.moe_inter_dim,
        "expert_shared_count": cfg.n_shared_experts,
        "expert_gating_func": GATING[cfg.score_func],
        "expert_weights_norm": cfg.norm_topk_prob,
        "expert_weights_scale": cfg.route_scale,
    }
    if sparse:
        facts |= {"expert_count": cfg.n_routed_experts, "expert_used_count": cfg.n_activated_experts}
        if _limited(cfg):
            facts |= {"expert_group_count": cfg.n_expert_groups, "expert_group_used_count": cfg.n_limited_groups}
    if cfg.yarn:
        facts |= {
            "rope.scaling.factor": cfg.rope_factor,
            "rope.scaling.original_context_length": cfg.original_seq_len,
            # The factor 0.1 is a habit of this architecture; llama.cpp divides it out again.
            "rope.scaling.yarn_log_multiplier": 0.1 * cfg.mscale_all_dim,
        }
    return {f"{ARCH}.{key}": value for key, value in facts.items()}


def vocabulary(directory: Path, rows: int) -> dict[str, Any]:
    """Tokenizer and chat template; `rows` of the embedding, of which the last may belong to no token."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json, and a GGUF file holds the tokenizer too; copy it there")
    spec, config = read_json(directory / "tokenizer.json"), read_json(directory / "tokenizer_config.json")
    check_split(spec, str(directory / "tokenizer.json"))
    added = {token["id"]: token for token in spec["added_tokens"]}
    text = {number: content for content, number in spec["model"]["vocab"].items()}
    text |= {number: token["content"] for number, token in added.items()}
    if max(text) >= rows:
        raise UserError(
            f"{directory}: the tokenizer has {max(text) + 1} tokens, but the embedding {rows} rows; they do not "
            "belong together"
        )
    kinds = [NORMAL if number in text else UNUSED for number in range(rows)]
    for number, token in added.items():
        control = token["special"] or re.fullmatch("<｜.*｜>", token["content"])
        kinds[number] = CONTROL if control else USER_DEFINED
    texts = [text.get(number, f"[PAD{number}]") for number in range(rows)]
    if len(set(texts)) < rows:
        twice = next(one for one in texts if texts.count(one) > 1)
        raise UserError(f"{directory / 'tokenizer.json'} gives {twice!r} two ids; save the tokenizer again")
    template = directory / "chat_template.jinja"
    template = template.read_text("utf-8") if template.is_file() else config.get("chat_template")
    facts = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": texts,
        "token_type": kinds,
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]],
        "add_bos_token": bool(config.get("add_bos_token")),
        "add_eos_token": bool(config.get("add_eos_token")),
        **{theirs: hub.token_id_of(directory, ours) for ours, theirs in ENDS.items()},
    }
    facts = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    return facts | ({"tokenizer.chat_template": template} if isinstance(template, str) and template else {})


def check_split(spec: dict[str, Any], where: str) -> None:
    """UserError unless the tokenizer is byte-level BPE behind V3's pre-split and nothing else."""
    model, splitter, normalizer = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    steps = []
    for step in splitter.get("pretokenizers", [splitter]):
        rule = (step.get("pattern") or {}).get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        ways = ("behavior", "invert") if step.get("type") == "Split" else ("add_prefix_space", "use_regex")
        steps.append((step.get("type"), rule, *map(step.get, ways)))
    other = (
        "dropout",
        "byte_fallback",
        "ignore_merges",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    )
    if (
        model["type"] != "BPE"
        or any(model.get(key) for key in other)
        or normalizer.get("normalizers", normalizer)
        or steps != [*(("Split", rule, "Isolated", False) for rule in SPLITS), ("ByteLevel", "", False, False)]
        or any(token.get(way) for token in spec["added_tokens"] for way in ("lstrip", "rstrip", "single_word"))
    ):
        raise UserError(
            f"{where} is not byte-level BPE with DeepSeek-V3's pre-split, and no other kind is written as GGUF here; "
            "llama.cpp's own convert_hf_to_gguf.py may know it"
        )
