"""Any Hugging Face causal language model behind the surface of our own network.

Trainer, objectives, Engine, reference policy and checkpoints use a model through `train_outputs`, `head_weight`,
`embed`, `cfg`, `gates`, `to_compute` and `save`; `CausalLM` offers these over a model of the transformers library (the
extra `hf`). Every other room of the house treats both alike.

Invariants
- Nothing that comes with a model is run: only architectures that the installed transformers has, only safetensors.
- Strict as `hub`: a missing, unknown or misshapen tensor is a UserError that names it; what was saved is read back.
- Logits are `head_weight` times the hidden state, and packed samples do not see each other. Both are tried out on a few
  tokens when a model is loaded; one that does more to its logits (a bias, a scale, a cap) is refused.
- Dropout is off always: the policy that is trained must be the one that sampled.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.hf.config_json import FAMILIES
from bessemer.hf.reader import Checkpoint, read_json
from bessemer.hf.writer import replacing
from bessemer.model.transformer import TrainOutputs, Transformer

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers whose memory is keys and values; a recurrent state cannot be handed from row to row like those."""
LIMITS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
CLOSE = 1e-3
"""Largest relative difference of the trials at loading; float32 gives 1e-6, bfloat16 a few 1e-3 at D = 64."""


class ForeignConfig(BaseModel):
    """The facts of a foreign model that the rest of the house asks for."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_type: str
    """The architecture, as config.json names it."""
    vocab_size: int
    """Rows of the embedding, which may be more than the tokenizer has."""
    dim: int
    """Width D of the residual stream."""
    n_layers: int
    """Decoder layers."""
    max_seq_len: int
    """Positions it was made for; a shorter attention window counts as the limit, so that no window ever closes."""
    n_mtp: int = 0
    """MTP modules: a foreign model has none."""


class CausalLM(nn.Module):
    """A transformers model with a head. `inner` stays what transformers made, names of parameters included."""

    layers: tuple = ()
    """Layers whose routing could be replayed: none."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        self.cfg = _facts(inner)
        accepted = inspect.signature(inner.base_model.forward).parameters
        self.cache_word = "cache" if "cache" in accepted else "past_key_values"
        """What this version of transformers calls the memory of earlier tokens."""
        self.train(False)

    def train(self, mode: bool = True) -> CausalLM:
        """Stays in evaluation mode whatever is asked for; see the invariants."""
        return super().train(False)

    @property
    def embed(self) -> nn.Embedding:
        return self.inner.get_input_embeddings()

    @property
    def head_weight(self) -> Tensor:
        return self.inner.get_output_embeddings().weight

    def gates(self) -> dict[str, Any]:
        """No gate of a foreign model is balanced here."""
        return {}

    def to_compute(self, dtype: torch.dtype) -> CausalLM:
        """All parameters in one dtype, as transformers' modules expect; buffers (rotary frequencies) as they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, **cached: Any) -> Tensor:
        """Hidden states ready for the head, [B, T, D]. Positions that begin again at 0 begin a new segment."""
        out = self.inner.base_model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=bool(cached), **cached)
        return out.last_hidden_state

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.hidden(tokens_BT, _positions(segments_BT)) @ self.head_weight.T

    def train_outputs(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, mtp: bool = False) -> TrainOutputs:
        """As `Transformer.train_outputs`: no MTP depth, and no balance term."""
        hidden_BTD = self.hidden(tokens_BT, _positions(segments_BT))
        return TrainOutputs(hidden_BTD, [], torch.zeros((), device=tokens_BT.device))

    def save(
        self, directory: str | Path, *, tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None
    ) -> None:
        """Writes a plain Hugging Face directory in one step, verified by reading it back. tokenizer_dir: where to copy
        the tokenizer from. files: further text files by name."""
        with replacing(Path(directory)) as fresh:
            try:
                self.inner.save_pretrained(fresh)
            except ValueError as error:  # generation settings that contradict each other
                raise UserError(f"{directory}: transformers does not write this model: {_first_line(error)}") from None
            for name in hub.TOKENIZER_FILES if tokenizer_dir is not None else ():
                if (Path(tokenizer_dir) / name).is_file():
                    shutil.copyfile(Path(tokenizer_dir) / name, fresh / name)
            for name, text in (files or {}).items():
                (fresh / name).write_text(text, "utf-8")
            again = _read(fresh, next(self.parameters()).dtype).state_dict()
            for name, tensor in self.inner.state_dict().items():
                if not torch.equal(again[name], tensor.to(again[name].device)):
                    raise UserError(f"{fresh}: tensor {name} reads back differently from what was written")


def is_foreign(directory: str | Path) -> bool:
    """Whether config.json announces another architecture than `Transformer`'s."""
    return read_json(Path(directory) / "config.json").get("model_type") not in FAMILIES


def load_any(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", mtp: bool = True
) -> Transformer | CausalLM:
    """The model of a directory, whichever kind it is. dtype as in `hub.load`."""
    if not Path(directory).is_dir():
        raise UserError(f"{directory} is not a directory; name the folder that holds config.json")
    return load(directory, dtype, device) if is_foreign(directory) else hub.load(directory, dtype, device, mtp)


def load(directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> CausalLM:
    """A foreign model. dtype: of all parameters (None: as stored)."""
    directory = Path(directory)
    if read_json(directory / "config.json").get("quantization_config"):
        raise UserError(f"{directory} holds quantised weights, which cannot be trained; take the original ones")
    Checkpoint(directory)  # refuses pickles, and names what is damaged
    return tried(CausalLM(_read(directory, hub.DTYPES.get(dtype, dtype)).to(device)), str(directory))


@torch.no_grad()
def tried(model: CausalLM, where: str) -> CausalLM:
    """The model itself, after a trial on six tokens of what the invariants promise."""
    device = model.embed.weight.device
    tokens_BT = (torch.arange(6, device=device) * 7 % model.cfg.vocab_size)[None]
    ours, theirs = model(tokens_BT), model.inner(input_ids=tokens_BT, use_cache=False).logits
    if not _close(ours, theirs.to(ours.dtype)):
        raise UserError(
            f"{where}: {model.cfg.model_type} does more to its logits than multiply the head by the hidden state (a "
            "bias, a scale or a cap); such a model is not supported"
        )
    packed = model(tokens_BT, torch.tensor([[1, 1, 2, 2, 2, 2]], device=device))
    alone = torch.cat((model(tokens_BT[:, :2]), model(tokens_BT[:, 2:])), 1)
    if not _close(packed, alone):
        raise UserError(
            f"{where}: transformers lets packed samples of {model.cfg.model_type} see each other; such a model is not "
            "supported (a newer transformers may keep them apart)"
        )
    return model


def library() -> Any:
    """The transformers library; UserError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError("models of other architectures need transformers: pip install 'bessemer[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _read(directory: Path, dtype: torch.dtype | None) -> Any:
    """The transformers model of a directory, every tensor of it read and none left over."""
    transformers = library()
    try:
        inner, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{directory}: transformers {transformers.__version__} does not read this model ({_first_line(error)}). "
            "Code that comes with a model is never run; a newer transformers may know the architecture"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = (item if isinstance(item, str) else item[0] for item in report.get(what) or ())
        if found := sorted(names):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(f"{directory}: {what.removesuffix('_keys')} tensor {found[0]}{more}; download it again")
    return inner


def _facts(inner: Any) -> ForeignConfig:
    config = inner.config
    head = inner.get_output_embeddings()
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if kinds or getattr(inner, "_is_stateful", False):
        raise UserError(f"{config.model_type} is not supported: it remembers by {', '.join(kinds) or 'a state'}")
    if not isinstance(head, nn.Linear) or head.bias is not None or inner.base_model is inner:
        raise UserError(f"{config.model_type} is not supported: its head is not one matrix")
    limits = [getattr(config, name, None) for name in LIMITS]
    if limits[0] is None:
        raise UserError(f"{config.model_type} is not supported: config.json has no max_position_embeddings")
    rows, dim = inner.get_input_embeddings().weight.shape
    return ForeignConfig(
        model_type=config.model_type, vocab_size=rows, dim=dim, n_layers=config.num_hidden_layers,
        max_seq_len=min(limit for limit in limits if limit),
    )  # fmt: skip


def _positions(segments_BT: Tensor | None) -> Tensor | None:
    """Position of each token within its segment; transformers takes every return to 0 for a new segment."""
    if segments_BT is None:
        return None
    T = segments_BT.shape[1]
    place_T = torch.arange(T, device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return place_T - torch.where(begins_BT, place_T, 0).cummax(1).values


def _close(ours: Tensor, theirs: Tensor) -> bool:
    bound = CLOSE if ours.dtype == torch.float32 else 30 * CLOSE
    return bool((ours - theirs).float().norm() <= bound * theirs.float().norm())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
