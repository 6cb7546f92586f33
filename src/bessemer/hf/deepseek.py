"""The network on disk: Hugging Face model directories, read and written without loss.

    load(dir)          a Transformer, from BF16, F32 or block-FP8 weights; with kind=Scorer a reward model
    save(model, dir)   config.json, generation_config.json, safetensors, tokenizer files
    read_config, write_config

Invariants
- Strict in both directions: a missing, unknown, misshapen, doubled or unreadable tensor is a UserError that names
  tensor and file. Only two absences are allowed: copies of shared tensors, and all MTP layers at once.
- Every export is read back and compared before it replaces an older one.

Names: `mapping`. Files and quantised weights: `safetensors_reader`, `safetensors_writer`. Putting in place: `replace`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bessemer.data.fingerprints import check_finished
from bessemer.data.model_files import read_object
from bessemer.errors import UserError
from bessemer.hf.mapping import FIELDS, Slot, from_hf, is_mtp_key, is_reward_model, reward_model_json, slots, to_hf
from bessemer.hf.replace import replacing
from bessemer.hf.safetensors_reader import Checkpoint, cast, fp8_block_size
from bessemer.hf.safetensors_writer import Form, Read, write_json, write_slots
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Scorer, Transformer

Network = TypeVar("Network", bound=Transformer)
SHARD_BYTES = 5e9
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SIZES = (
    "vocab_size", "dim", "n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
DENSE_SIZES, SPARSE_SIZES = ("inter_dim",), ("moe_inter_dim", "n_shared_experts")
"""Fields that are, or divide, a dimension of some tensor: SIZES in any network, the others in one with such layers."""
EMBEDDING, TIED_HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OTHERS = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.json")
REPLACED = ("generation_config.json", *TOKENIZER_FILES, *OTHERS, "additional_chat_templates")
"""What a new model with a tokenizer never takes over from the directory that it replaces."""
AS_IS = Form()


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a model directory."""
    path = Path(directory) / "config.json"
    return from_hf(read_object(path), str(path))


def write_config(cfg: ModelConfig, directory: str | Path, *, dtype: torch.dtype = torch.float32, bos: int = 0,
                 eos: int | list[int] = 1, pad: int | None = None, form: Form = AS_IS) -> None:  # fmt: skip
    """Writes config.json and generation_config.json (the sampling settings that R1 recommends). With `pad` it is the
    config of a reward model, which never samples."""
    directory = Path(directory)
    values = to_hf(cfg, dtype, bos, eos) | dict(form.facts)
    if pad is not None:
        write_json(directory / "config.json", reward_model_json(values, pad))
        return
    write_json(directory / "config.json", values)
    generation = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    write_json(directory / "generation_config.json", generation)


def load(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", mtp: bool = True,
    *, kind: type[Network] = Transformer,  # type: ignore[assignment]
    context: Mapping[str, Any] | None = None,
) -> Network:  # fmt: skip
    """The model of a directory. dtype: of the matrices (None: as stored, BF16 for FP8); norm gains, gates and routing
    biases are always float32. mtp=False does not load the MTP layers. context: as in `open_directory`."""
    check_finished(Path(directory))
    checkpoint, cfg, layout = open_directory(Path(directory), mtp, kind, context)
    model = _allocate(cfg, parse_dtype(dtype) or checkpoint.stored_dtype(EMBEDDING), device, kind)
    _read(checkpoint, layout, model)
    return model


def read_into(model: Transformer, directory: Path) -> None:
    """Replaces the weights of a model by those of a directory of the same shapes, one tensor at a time."""
    checkpoint, _, layout = open_directory(directory, bool(model.cfg.n_mtp), type(model))
    _read(checkpoint, layout, model)


@torch.no_grad()
def _read(checkpoint: Checkpoint, layout: Sequence[Slot], model: Transformer) -> None:
    state = model.state_dict()
    for slot in layout:
        target = slot.of(state)
        if not slot.copy:
            target.copy_(checkpoint.read(slot.key, target.dtype))
        elif slot.key in checkpoint.entries:
            compare_copy(checkpoint, slot, target.cpu())


def save(
    model: Transformer, directory: str | Path, *, mtp: bool = True, dtype: str | torch.dtype | None = None,
    form: Form = AS_IS, max_shard_bytes: float = SHARD_BYTES, tokenizer_dir: str | Path | None = None,
    files: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes a model directory atomically and verifies it by reading it back.

    dtype: of every tensor except the routing biases, which stay float32 (None: each as in the model). form: how tensors
    are stored; dtype applies to those that it leaves as they are. mtp=False drops the MTP layers, for programs that do
    not support them. tokenizer_dir: where to copy the tokenizer from. files: further text files by name. Other files of
    a replaced directory are kept, except an older tokenizer.
    """
    cfg = model.cfg if mtp else without_mtp(model.cfg)
    state = model.state_dict()
    write(
        cfg, lambda slot, dtype: cast(slot.of(state), dtype, slot.key), lambda slot: slot.of(state).dtype, directory,
        kind=type(model), dtype=dtype, form=form, max_shard_bytes=max_shard_bytes, tokenizer_dir=tokenizer_dir,
        files=files,
    )  # fmt: skip


def write(
    cfg: ModelConfig, read: Read, dtype_of: Callable[[Slot], torch.dtype],
    directory: str | Path, *, kind: type[Transformer] = Transformer, dtype: str | torch.dtype | None = None,
    form: Form = AS_IS, max_shard_bytes: float = SHARD_BYTES, tokenizer_dir: str | Path | None = None,
    files: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """`save` for tensors stored anywhere, with one in memory at a time: `read(slot, dtype)` returns a tensor,
    `dtype_of(slot)` its stored dtype."""
    forced = parse_dtype(dtype) or form.dtype
    layout = written_slots(cfg, kind)
    dtypes = [target_dtype(slot, dtype_of(slot), forced) for slot in layout]
    embedding = next(slot for slot in layout if slot.key == EMBEDDING)
    with replacing(Path(directory), () if tokenizer_dir is None else REPLACED) as fresh:
        bos, eos, pad = 0, 1, 2 if issubclass(kind, Scorer) else None
        if tokenizer_dir is not None:
            copy_files(Path(tokenizer_dir), fresh, TOKENIZER_FILES)
            bos, eos = token_id_of(fresh, "bos_token"), token_id_of(fresh, "eos_token")
            pad = None if pad is None else token_id_of(fresh, "pad_token")
        write_config(cfg, fresh, dtype=forced or dtype_of(embedding), bos=bos, eos=eos, pad=pad, form=form)
        for name, text in (files or {}).items():
            (fresh / name).write_text(text, "utf-8")
        write_slots(fresh, layout, dtypes, read, form, max_shard_bytes)


def written_slots(cfg: ModelConfig, kind: type[Transformer] = Transformer) -> list[Slot]:
    """The tensors that `write` asks for, in this order."""
    return [slot for slot in slots(cfg, kind) if slot.key != TIED_HEAD or not cfg.tie_embeddings]


def open_directory(
    directory: Path, mtp: bool, kind: type[Transformer], context: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, ModelConfig, list[Slot]]:
    """Returns the checked checkpoint, the config of the part to read, and where each tensor goes. `context`: new values
    for fields of `config.CONTEXT`, on which no tensor depends."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name the folder that holds config.json")
    cfg, values = read_config(directory).at_length(context or {}), read_object(directory / "config.json")
    check_kind(values, issubclass(kind, Scorer), directory)
    checkpoint = Checkpoint(directory, fp8_block_size(values, str(directory / "config.json")))
    mtp_keys = {key for key in checkpoint.entries if is_mtp_key(key, cfg.n_layers)}
    if mtp and cfg.n_mtp and not mtp_keys:
        warnings.warn(f"{directory} declares {cfg.n_mtp} MTP layers but has none; reading without MTP", stacklevel=3)
    if not mtp or not mtp_keys:
        cfg = without_mtp(cfg)
    _check_sizes(cfg, checkpoint)
    layout = slots(cfg, kind)
    checkpoint.check(layout, allowed=() if mtp else mtp_keys)
    return checkpoint, cfg, layout


def check_kind(values: dict[str, Any], reward: bool, directory: Path) -> None:
    """Raises UserError for a reward model where a language model is needed, or the reverse."""
    if is_reward_model(values) != reward:
        stored, needed = ("language", "reward") if reward else ("reward", "language")
        raise UserError(f"{directory} holds a {stored} model, but a {needed} model is needed; name another directory")


def _check_sizes(cfg: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises UserError for a config.json that declares more than the files can hold, before anything is built from it:
    even on the meta device, a million experts take minutes."""
    where, n = checkpoint.directory, len(checkpoint.entries)
    layers, sparse = cfg.n_layers + cfg.n_mtp, cfg.n_layers + cfg.n_mtp - cfg.n_dense_layers
    least = 8 * layers + 3 * sparse * cfg.n_routed_experts
    if least > n:
        raise UserError(
            f"{where}: config.json declares {layers} layers with {cfg.n_routed_experts} experts, at least {least} "
            f"tensors, but the files hold {n}; the two do not match"
        )
    for name in (*SIZES, *DENSE_SIZES * (cfg.n_dense_layers > 0), *SPARSE_SIZES * (sparse > 0)):
        if not 0 <= getattr(cfg, name) <= checkpoint.widest:
            raise UserError(
                f"{where}: config.json has {FIELDS[name]} = {getattr(cfg, name)}, but no tensor is wider than "
                f"{checkpoint.widest}; the two do not match"
            )


def _allocate(cfg: ModelConfig, dtype: torch.dtype, device: str | torch.device, kind: type[Network]) -> Network:
    """A model with uninitialised memory, because every parameter is about to be read.

    torch's own `to_empty` takes a second at its first call: on meta tensors it goes through Python and imports sympy.
    """
    with torch.device("meta"):
        model = kind(cfg).to_compute(dtype)
    state = model.state_dict()
    model.load_state_dict({name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in state.items()},
                          assign=True)  # fmt: skip
    if cfg.tie_embeddings and not isinstance(model, Scorer):
        model.head.weight = model.embed.weight  # the assignment above split the shared tensor
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # counters are not in checkpoints
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def compare_copy(checkpoint: Checkpoint, slot: Slot, main: Tensor) -> None:
    if not torch.equal(checkpoint.read(slot.key, main.dtype), main):
        raise UserError(
            f"{checkpoint.entries[slot.key].file}: tensor {slot.key} differs from the main model's, which it must copy "
            "(embedding and head are shared); correct the file, or leave the MTP layers out"
        )


def without_mtp(cfg: ModelConfig) -> ModelConfig:
    return cfg.model_copy(update={"n_mtp": 0})


def target_dtype(slot: Slot, stored: torch.dtype, forced: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is written in: routing biases are always float32."""
    return torch.float32 if slot.name.endswith("bias_E") else forced or stored


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies the named files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def token_id_of(directory: Path, which: str) -> int:
    """The id of the directory's bos_token, eos_token or pad_token."""
    name = read_object(directory / "tokenizer_config.json").get(which)
    name = name.get("content") if isinstance(name, dict) else name
    for token in read_object(directory / "tokenizer.json").get("added_tokens", []):
        if token["content"] == name:
            return token["id"]
    raise UserError(f"the tokenizer has no {which}; save it again with one")
