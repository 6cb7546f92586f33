"""A model directory as one GGUF file of architecture `deepseek2`, for llama.cpp and software built on it.

    write(dir, file, dtype)   weights in F32, F16 or BF16, tokenizer, chat template; no MTP layers
    read_gguf(file, dir)      a model of another family: transformers undoes the quantisation (with the `gguf` package),
                              and the weights are plain numbers on the grid of the quantisation

llama.cpp computes MLA in the absorbed form, so kv_b_proj is split into the keys' part, transposed, and the values'
part. The experts of a layer are one tensor. Rotary dimensions stay as they are: pairs are interleaved there too.

- The file gives the same logits in llama.cpp as the directory does here. Models that llama.cpp would compute
  differently or not load are refused (by the sources of llama-cpp-python 0.3.36); nothing is approximated. Two
  differences remain: it divides gates by max(sum, 6e-5), we by sum + 1e-20, and it may sample rows without a token.
- Norm gains, gates and routing biases are F32 whatever the dtype: the gate decides between experts.
- Only one tensor of the directory is in memory at a time. The file is written under another name, read back by the
  `gguf` package, compared, and renamed; the old file stays until then.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.addons.families.causal_lm import CausalLM, checked, transformers_library
from bessemer.addons.families.conversion import check_target, replacing_file
from bessemer.addons.families.hf_tokenizer import check_pretokenizer
from bessemer.addons.families.modelfile import damage_named
from bessemer.data.fingerprints import check_finished
from bessemer.data.model_files import read_object, read_text
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import FAMILIES, Slot
from bessemer.hf.safetensors_reader import Checkpoint, cast
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

ARCH = "deepseek2"
KINDS = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
"""GGUF name of the number format, and the file type number."""
GATING = {"softmax": 1, "sigmoid": 2}
SAMPLING = {"temperature": "general.sampling.temp", "top_p": "general.sampling.top_p"}
MAX_LAYERS, MAX_EXPERTS = 512, 1024
LITE_LAYERS = {26, 27}
"""llama.cpp treats a file with this many layers as V2-Lite or similar, whose queries are not compressed."""
BETAS = (32.0, 1.0)
"""beta_fast and beta_slow, which llama.cpp does not read for this architecture."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types. CONTROL is plain text inside a prompt and decodes to nothing; USER_DEFINED is always a single id."""
ENDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}

MODEL = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
LAYER = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight", "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight", "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}  # fmt: skip
KV_B, GATE = "self_attn.kv_b_proj.weight", "mlp.gate.weight"
EXPERT = re.compile(r"(?<=\.mlp\.experts)\.\d+")


class GGUFTensor(NamedTuple):
    """A tensor of the file, made of parts of one or more tensors of the directory, one after another."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """In torch's order; the file lists the sizes innermost first."""
    keys: tuple[str, ...]
    part: Callable[[Tensor], Tensor] = torch.detach
    """The part of each tensor that is written."""

    @property
    def kind(self) -> str:
        return KINDS[self.dtype][0]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(directory: str | Path, file: str | Path, dtype: str | torch.dtype | None = None) -> None:
    """Writes the model of a directory as `file`. dtype: of the matrices (None: as stored, BF16 for FP8, F32 if they are
    mixed). Raises UserError for anything that llama.cpp would load differently or not at all."""
    directory, file = Path(directory), Path(file)
    check_target(directory, file, force=True)
    chosen = deepseek.parse_dtype(dtype)
    family = read_object(directory / "config.json").get("model_type")
    if str(family) not in FAMILIES:
        raise UserError(
            f"{directory}: model_type {family!r} is not in the DeepSeek family, the only one written as GGUF here; "
            "convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    check_finished(directory)
    checkpoint, cfg, layout = deepseek.open_directory(directory, False, Transformer)
    check_network(cfg, str(directory))
    for slot in layout:
        if slot.copy and slot.key in checkpoint.entries:
            deepseek.compare_copy(checkpoint, slot, checkpoint.read(deepseek.EMBEDDING))
    chosen = chosen or _widest(checkpoint, layout)
    with damage_named(directory):
        facts = general_facts(directory, chosen) | network_facts(cfg) | tokenizer_facts(directory, cfg.vocab_size)
    plan = plan_tensors(cfg, layout, chosen)
    with replacing_file(file) as fresh:
        _verify(fresh, facts, plan, _write(fresh, facts, plan, checkpoint))


def plan_tensors(cfg: ModelConfig, layout: list[Slot], dtype: torch.dtype) -> list[GGUFTensor]:
    """Every tensor of the file in order. `layout`: the tensors of the directory."""
    gathered: dict[str, list[Slot]] = {}
    for slot in layout:
        if not slot.copy:
            gathered.setdefault(EXPERT.sub("", slot.key), []).append(slot)
    plan = []
    for key, slots in gathered.items():
        keys, size = tuple(slot.key for slot in slots), slots[0].shape
        size = size if key == keys[0] else (len(slots), *size)
        *_, layer, rest = key.split(".", 3) if key not in MODEL else ("", key)
        if rest == KV_B:
            heads, rank = cfg.n_heads, cfg.kv_lora_rank
            for name, rows in (("k_b", (rank, cfg.qk_nope_head_dim)), ("v_b", (cfg.v_head_dim, rank))):
                part = partial(_head_parts, cfg, name)
                plan.append(GGUFTensor(f"blk.{layer}.attn_{name}.weight", dtype, (heads, *rows), keys, part))
            continue
        kind = torch.float32 if len(size) == 1 or rest == GATE else dtype
        plan.append(GGUFTensor(MODEL.get(key) or f"blk.{layer}.{LAYER[rest]}", kind, size, keys))
    return plan


def _head_parts(cfg: ModelConfig, which: str, kv_b: Tensor) -> Tensor:
    """W_UK transposed [H, d_c, d_h], or W_UV [H, d_v, d_c], of kv_b_proj [H (d_h + d_v), d_c]."""
    heads = kv_b.view(cfg.n_heads, -1, cfg.kv_lora_rank)
    keys, values = heads.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
    return keys.transpose(1, 2) if which == "k_b" else values


def _widest(checkpoint: Checkpoint, layout: list[Slot]) -> torch.dtype:
    """The dtype that holds every matrix without loss; F64, which llama.cpp does not multiply, becomes F32."""
    matrices = [s.key for s in layout if s.key in checkpoint.entries and len(s.shape) > 1 and not s.key.endswith(GATE)]
    widest = reduce(torch.promote_types, map(checkpoint.stored_dtype, matrices))
    return widest if widest in KINDS else torch.float32


def _write(file: Path, facts: dict[str, Any], plan: list[GGUFTensor], checkpoint: Checkpoint) -> dict[str, int]:
    """Writes the file; returns the CRC-32 of each tensor by name."""
    gguf = _library()
    writer = gguf.GGUFWriter(None, facts["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    for key, value in facts.items():
        if key != "general.architecture":  # written by the constructor
            adders[type(value)](key, value)
    for item in plan:
        kind = gguf.GGMLQuantizationType[item.kind]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.size, raw_dtype=kind)
    sums = {}
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The library takes only whole tensors, but the experts of a layer come one by one.
        [stream] = writer.fout
        writer.write_padding(stream, stream.tell())
        for item in plan:
            crc, written = 0, 0
            for data in _parts(item, checkpoint):
                stream.write(data)
                crc, written = zlib.crc32(data, crc), written + len(data)
            assert written == item.size, item
            writer.write_padding(stream, item.size)
            sums[item.name] = crc
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()
    return sums


def _parts(item: GGUFTensor, checkpoint: Checkpoint) -> Iterator[memoryview]:
    for key in item.keys:
        tensor = cast(item.part(checkpoint.read(key, torch.float32)), item.dtype, key, f"{checkpoint.directory}: ")
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _verify(file: Path, facts: dict[str, Any], plan: list[GGUFTensor], sums: dict[str, int]) -> None:
    """Reads the file with the `gguf` package and compares everything; raises UserError at the first difference."""
    try:
        reader = _library().GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file} cannot be read back ({error}); check the disk") from error
    expected = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in facts.items()}
    bad = [key for key in fields.keys() | expected.keys() if fields.get(key) != expected.get(key)]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    bad += sorted(tensors.keys() ^ sums.keys())
    for item in plan:
        written = tensors.get(item.name)
        agrees = (
            written is not None
            and (written.tensor_type.name, tuple(written.shape[::-1].tolist())) == (item.kind, item.shape)
            and zlib.crc32(memoryview(written.data.reshape(-1).view(np.uint8))) == sums[item.name]
        )
        bad += [] if agrees else [item.name]
    if bad:
        raise UserError(f"{file}: {bad[0]} reads back differently from what was written; check the disk")


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need one more package: pip install 'bessemer[hf]'") from None
    return gguf


def check_network(cfg: ModelConfig, where: str) -> None:
    """Raises UserError for a network that llama.cpp's deepseek2 would compute differently or not load."""
    cfg.require_latent(f"{where}: GGUF")
    sparse = cfg.n_dense_layers < cfg.n_layers
    lite = cfg.n_layers in LITE_LAYERS or (cfg.n_layers, cfg.vocab_size) == (48, 128256)  # the latter: Kanana-2
    temperatures = f"mscale {cfg.mscale:g} and mscale_all_dim {cfg.mscale_all_dim:g}"
    betas = f"beta_fast {cfg.beta_fast:g} and beta_slow {cfg.beta_slow:g}"
    refused = {
        f"YaRN with {temperatures}; llama.cpp needs the same non-zero number for both":
            cfg.yarn and (cfg.mscale != cfg.mscale_all_dim or not cfg.mscale),
        f"YaRN with {betas}; llama.cpp always takes {BETAS[0]:g} and {BETAS[1]:g}":
            cfg.yarn and (cfg.beta_fast, cfg.beta_slow) != BETAS,
        f"compressed queries in {cfg.n_layers} layers; llama.cpp takes a model of that depth for V2-Lite, without them":
            lite and cfg.q_lora_rank > 0,
        "expert layers without shared experts; llama.cpp needs one": sparse and cfg.n_shared_experts == 0,
        "shared experts that differ in width from the routed ones": sparse and cfg.own,
        f"groups rated by the best {cfg.n_rated_experts} of their experts; llama.cpp rates them by their two best":
            sparse and cfg.limited and cfg.n_rated_experts != 2,
        "route_scale 0, which llama.cpp reads as 1": sparse and cfg.route_scale == 0,
        f"{cfg.n_layers} layers; llama.cpp allows {MAX_LAYERS}": cfg.n_layers > MAX_LAYERS,
        f"{cfg.n_routed_experts} experts; llama.cpp allows {MAX_EXPERTS}":
            sparse and cfg.n_routed_experts > MAX_EXPERTS,
    }  # fmt: skip
    for words, holds in refused.items():
        if holds:
            raise UserError(f"{where} has {words}. It cannot be written as GGUF; serve it with vLLM or SGLang instead")


def general_facts(directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Metadata of the file, including the sampling settings that generation_config.json recommends."""
    facts = {
        "general.architecture": ARCH, "general.type": "model", "general.name": directory.resolve().name,
        "general.file_type": KINDS[dtype][1], "general.quantization_version": 2,
    }  # fmt: skip
    path = directory / "generation_config.json"
    advised = read_object(path) if path.is_file() else {}
    if advised.get("do_sample"):
        facts |= {theirs: float(advised[ours]) for ours, theirs in SAMPLING.items() if advised.get(ours) is not None}
    return facts


def network_facts(cfg: ModelConfig) -> dict[str, Any]:
    """Sizes and rules of the network. Key and value lengths are those of the absorbed form: one head for all queries,
    as wide as the latent; the `_mla` lengths are those of the heads."""
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
        if cfg.limited:
            facts |= {"expert_group_count": cfg.n_expert_groups, "expert_group_used_count": cfg.n_limited_groups}
    if cfg.yarn:
        facts |= {
            "rope.scaling.factor": cfg.rope_factor,
            "rope.scaling.original_context_length": cfg.original_seq_len,
            # This architecture stores 0.1 times the value; llama.cpp divides it out again.
            "rope.scaling.yarn_log_multiplier": 0.1 * cfg.mscale_all_dim,
        }
    return {f"{ARCH}.{key}": value for key, value in facts.items()}


def tokenizer_facts(directory: Path, rows: int) -> dict[str, Any]:
    """Tokenizer and chat template; `rows`: rows of the embedding, the last of which may have no token."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json, but a GGUF file includes the tokenizer; copy it there")
    spec, config = read_object(directory / "tokenizer.json"), read_object(directory / "tokenizer_config.json")
    check_pretokenizer(spec, str(directory / "tokenizer.json"))
    added = {token["id"]: token for token in spec["added_tokens"]}
    text = {number: content for content, number in spec["model"]["vocab"].items()}
    text |= {number: token["content"] for number, token in added.items()}
    if max(text) >= rows:
        raise UserError(
            f"{directory}: the tokenizer has {max(text) + 1} tokens, but the embedding has {rows} rows; they do not "
            "match"
        )
    kinds = [NORMAL if number in text else UNUSED for number in range(rows)]
    for number, token in added.items():
        control = token["special"] or re.fullmatch("<｜.*｜>", token["content"])
        kinds[number] = CONTROL if control else USER_DEFINED
    texts = [text.get(number, f"[PAD{number}]") for number in range(rows)]
    if len(set(texts)) < rows:
        twice = next(token for token in texts if texts.count(token) > 1)
        raise UserError(f"{directory / 'tokenizer.json'} gives {twice!r} two ids; save the tokenizer again")
    file = directory / "chat_template.jinja"
    template = read_text(file) if file.exists() else config.get("chat_template")
    facts = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": texts,
        "token_type": kinds,
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]],
        "add_bos_token": bool(config.get("add_bos_token")),
        "add_eos_token": bool(config.get("add_eos_token")),
        **{theirs: deepseek.token_id_of(directory, ours) for ours, theirs in ENDS.items()},
    }
    facts = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    return facts | ({"tokenizer.chat_template": template} if isinstance(template, str) and template else {})


def read_gguf(file: Path, tokenizer_dir: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a GGUF file in `dtype`; its tokenizer and chat template are written to `tokenizer_dir`."""
    transformers = transformers_library()
    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            inner = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    except ImportError as error:
        raise UserError(f"{file.name}: GGUF files need more packages ({error}): pip install 'bessemer[hf]'") from None
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{file}: transformers cannot read this GGUF file ({error}); use safetensors") from error
    tokenizer.save_pretrained(tokenizer_dir)
    # The weights are plain now, but the config still declares quantisation, so transformers would not save the model.
    config = inner.config
    del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(inner.state_dict())
    plain.generation_config = inner.generation_config
    return checked(CausalLM(plain), str(file))
