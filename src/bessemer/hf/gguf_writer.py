"""A model directory as one GGUF file of architecture `deepseek2`, for llama.cpp and what is built on it.

    write(dir, file, dtype)   weights in F32, F16 or BF16, tokenizer, chat template; no MTP layers

llama.cpp computes MLA in the absorbed form, so kv_b_proj is cut into its keys' part, transposed, and its values' part.
The experts of a layer are one tensor. Rotary dimensions stay as they are: pairs are interleaved there too.

Invariants
- The file gives the same logits there as the directory here. What llama.cpp would compute differently or not load is
  refused (`gguf_facts`); nothing is approximated.
  Two differences are left: it divides gates by max(sum, 6e-5), we by sum + 1e-20, and it may draw the rows of the
  embedding that belong to no token.
- Norm gains, gates and routing biases are F32 whatever the dtype: the gate decides between experts.
- One tensor of the directory at a time is in memory. The file is written under another name, read back by the `gguf`
  package, compared, and renamed; the old file stays until then.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.hf import hub, writer
from bessemer.hf.config_json import FAMILIES
from bessemer.hf.gguf_facts import KINDS, check_shape, general, shape, vocabulary
from bessemer.hf.names import Slot
from bessemer.hf.reader import Checkpoint, read_json
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

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


class Planned(NamedTuple):
    """A tensor to be written: the parts of one or more tensors of the directory, one after another."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """As in torch; the file lists the sizes innermost first."""
    keys: tuple[str, ...]
    part: Callable[[Tensor], Tensor] = torch.detach
    """What of each tensor is written."""

    @property
    def kind(self) -> str:
        return KINDS[self.dtype][0]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(directory: str | Path, file: str | Path, dtype: str | torch.dtype | None = None) -> None:
    """Writes the model of a directory as `file`. dtype: of the matrices (None: as stored, BF16 for FP8, F32 where they
    are mixed). UserErrors for everything llama.cpp would load differently, or not at all."""
    directory, file = Path(directory), Path(file)
    wanted = hub.as_dtype(dtype)
    family = read_json(directory / "config.json").get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{directory}: model_type {family!r} is not of the DeepSeek family, and only that is written as GGUF here; "
            "convert it with llama.cpp's own convert_hf_to_gguf.py"
        )
    checkpoint, cfg, layout = hub.open_directory(directory, False, Transformer)
    check_shape(cfg, str(directory))
    for slot in layout:
        if slot.copy and slot.key in checkpoint.entries:
            hub.compare_copy(checkpoint, slot, checkpoint.read(hub.EMBEDDING))
    wanted = wanted or _widest(checkpoint, layout)
    facts = general(directory, wanted) | shape(cfg) | vocabulary(directory, cfg.vocab_size)
    plan = planned(cfg, layout, wanted)
    with _replacing(file) as fresh:
        _verify(fresh, facts, plan, _write(fresh, facts, plan, checkpoint))


def planned(cfg: ModelConfig, layout: list[Slot], dtype: torch.dtype) -> list[Planned]:
    """Every tensor of the file in order. `layout`: what the directory holds."""
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
                plan.append(Planned(f"blk.{layer}.attn_{name}.weight", dtype, (heads, *rows), keys, part))
            continue
        kind = torch.float32 if len(size) == 1 or rest == GATE else dtype
        plan.append(Planned(MODEL.get(key) or f"blk.{layer}.{LAYER[rest]}", kind, size, keys))
    return plan


def _head_parts(cfg: ModelConfig, which: str, kv_b: Tensor) -> Tensor:
    """W_UK transposed [H, d_c, d_h], or W_UV [H, d_v, d_c], of kv_b_proj [H (d_h + d_v), d_c]."""
    heads = kv_b.view(cfg.n_heads, -1, cfg.kv_lora_rank)
    keys, values = heads.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
    return keys.transpose(1, 2) if which == "k_b" else values


def _widest(checkpoint: Checkpoint, layout: list[Slot]) -> torch.dtype:
    """A dtype that holds every matrix as it is stored; F64, which llama.cpp does not multiply, becomes F32."""
    matrices = [s.key for s in layout if s.key in checkpoint.entries and len(s.shape) > 1 and not s.key.endswith(GATE)]
    found = reduce(torch.promote_types, map(checkpoint.stored_dtype, matrices))
    return found if found in KINDS else torch.float32


def _write(file: Path, facts: dict[str, Any], plan: list[Planned], checkpoint: Checkpoint) -> dict[str, int]:
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
        # The library takes whole tensors only; the experts of a layer come one by one.
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


def _parts(item: Planned, checkpoint: Checkpoint) -> Iterator[memoryview]:
    for key in item.keys:
        exact = item.part(checkpoint.read(key, torch.float32))
        made = exact.to(item.dtype)
        if not torch.equal(made.isfinite(), exact.isfinite()):
            raise UserError(
                f"{checkpoint.entries[key].file}: tensor {key} holds values too large for {item.kind}; take float32"
            )
        yield memoryview(made.contiguous().view(-1).view(torch.uint8).numpy())


def _verify(file: Path, facts: dict[str, Any], plan: list[Planned], sums: dict[str, int]) -> None:
    """Reads the file with the `gguf` package and compares everything; UserError on the first difference."""
    try:
        reader = _library().GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file} cannot be read back ({error}); check the disk") from error
    wanted = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in facts.items()}
    bad = [key for key in fields.keys() | wanted.keys() if fields.get(key) != wanted.get(key)]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    bad += sorted(tensors.keys() ^ sums.keys())
    for item in plan:
        found = tensors.get(item.name)
        same = (
            found is not None
            and (found.tensor_type.name, tuple(found.shape[::-1].tolist())) == (item.kind, item.shape)
            and zlib.crc32(memoryview(found.data.reshape(-1).view(np.uint8))) == sums[item.name]
        )
        bad += [] if same else [item.name]
    if bad:
        raise UserError(f"{file}: {bad[0]} reads back differently from what was written; check the disk")


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need one more package: pip install 'bessemer[hf]'") from None
    return gguf


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` for a file that takes its place when the block succeeds."""
    if target.is_dir():
        raise UserError(f"{target} is a directory; name the GGUF file to write, such as {target / 'model.gguf'}")
    fresh = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        os.replace(fresh, target)
        writer.sync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; it is as it was. Free space or choose another place"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
