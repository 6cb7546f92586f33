"""Any Hugging Face causal language model behind the interface of our own network.

`CausalLM` is a `LanguageModel` whose layers the transformers library computes (the extra `hf`); `CausalScorer` is a
reward model, like `Scorer`.

Invariants
- No code that comes with a model is run: only architectures of the installed transformers, only safetensors.
- Strict as `deepseek`: a missing, unknown or misshapen tensor is a UserError that names it; every save is read back.
- Logits are `head_weight` times the hidden state, and packed samples do not see each other. Loading checks both on a
  few tokens and refuses a model that does more to its logits (a bias, a scale, a cap).
- Dropout is always off: the trained policy must be the one that sampled.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bessemer.addons.families.routed import recording, replay, routers_of
from bessemer.addons.families.text_limits import LIMITS, longest_text
from bessemer.data.chat import render_ids
from bessemer.data.fingerprints import check_finished
from bessemer.data.model_files import AGAIN, MOST, check_regular, read_object
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.families import load_tokenizer
from bessemer.hf.replace import ADAPTER_CONFIG, replacing
from bessemer.hf.safetensors_reader import Checkpoint
from bessemer.hf.safetensors_writer import TensorSpec, verify, write_tensors
from bessemer.model.layer import Phase
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.segments import Packed, Segments
from bessemer.model.transformer import scores

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types whose cache is keys and values, which sequences can share; they cannot share a recurrent state."""
PER_LAYER, PER_EXPERT = re.compile("(?!.*(size|dim)).*(layer|block|depth)"), re.compile("(?!.*(size|dim)).*expert")
ALONG_TEXT = re.compile("position|theta|window|length|seq|chunk|_id$|scale|base|top")
FEW, LONGEST, MOST_OTHERS = 128, 1 << 40, 1_000_000
"""Limits on the numbers in config.json, whatever the files hold: counts, lengths, others."""
SPARE_BYTES = 1 << 30
"""Bytes of tables that a network may have in addition to its parameters."""
CLOSE = 1e-3
"""Largest relative difference in the checks at loading; float32 gives 1e-6, bfloat16 a few 1e-3 at D = 64."""


class CausalLMConfig(BaseModel):
    """Sizes of a transformers model that the rest of the package needs."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_type: str
    """The architecture's name in config.json."""
    vocab_size: int
    """Rows of the embedding; may exceed the number of tokens."""
    dim: int
    """Width D of the residual stream."""
    n_layers: int
    """Decoder layers."""
    max_seq_len: int
    """Longest supported sequence (`text_limits.longest_text`)."""
    n_routed_experts: int = 0
    """Experts of a router that can be replayed (`routed`); 0: there is none."""
    n_mtp: int = 0
    """MTP modules: none."""

    def require_latent(self, what: str) -> None:
        """Attention is not our own."""


class ExportedTensor(NamedTuple):
    """A tensor of a model directory."""

    key: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Names of this model's tensors that it is made of."""
    combine: Callable[..., Tensor] = lambda tensor: tensor


class CausalLM(LanguageModel):
    """A transformers model with a head. `inner` is the transformers model, unchanged, including parameter names."""

    cfg: CausalLMConfig
    layers, mtp = (), ()
    auto = "AutoModelForCausalLM"
    """The transformers class that reads and creates such models."""
    head: str | None = None
    """Name of the matrix that reads hidden states; None: the output embeddings."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        self.recomputed: list[nn.Module] = []
        """Layers whose activations backward computes again."""
        self.routers = routers_of(inner)
        self.cfg = _config_of(inner, self.head_layer, self.routers)
        accepted = inspect.signature(inner.base_model.forward).parameters
        self.cache_word = "cache" if "cache" in accepted else "past_key_values"
        """Name of the KV cache argument in this version of transformers."""
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Always stays in evaluation mode, see the invariants; only a layer that recomputes knows of training."""
        super().train(False)
        for layer in self.recomputed:
            layer.training = mode
        return self

    def set_recompute(self, phases: Iterable[Phase]) -> Self:
        """Recomputes whole decoder layers if any phase is named: transformers' layers have no such phases."""
        if not [*phases]:
            return self
        if not self.inner.supports_gradient_checkpointing:
            raise UserError(f"transformers cannot recompute {self.cfg.model_type}; leave [layout] recompute out")
        enable = getattr(self.inner, "activation_checkpointing_enable", self.inner.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        self.recomputed = [
            module for module in self.inner.modules()
            if isinstance(module, transformers_library().modeling_layers.GradientCheckpointingLayer)
        ]  # fmt: skip
        return self

    @property
    def embed(self) -> nn.Embedding:  # type: ignore[override]
        return self.inner.get_input_embeddings()

    @property
    def head_layer(self) -> Any:
        return getattr(self.inner, self.head) if self.head else self.inner.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        return self.head_layer.weight

    def to_compute(self, dtype: torch.dtype) -> Self:
        """Casts all parameters to one dtype, as transformers' modules expect; buffers (rotary frequencies) stay."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        if dtype == torch.float64 and hasattr(self.inner, "set_experts_implementation"):
            self.inner.set_experts_implementation("eager")  # grouped products know no float64
        return self

    @property
    def routes(self) -> bool:
        return bool(self.routers)

    def hidden(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, choice_BTLK: Tensor | None = None, /,
        **cached: object,
    ) -> Tensor:  # fmt: skip
        """Hidden states ready for the head, [B, T, D]. A position of 0 starts a new segment."""
        replay(self.routers, choice_BTLK)
        out = self.inner.base_model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=bool(cached), **cached)
        return out.last_hidden_state

    def forward(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.hidden(tokens_BT, _positions(segments)) @ self.head_weight.T

    def train_outputs(
        self, tokens_BT: Tensor, segments: Segments = None, mtp: bool = False, choice_BTLK: Tensor | None = None
    ) -> TrainOutputs:
        """Without MTP depths and without a balance term."""
        assert choice_BTLK is None or self.routes, "no router can be replayed"
        hidden_BTD = self.hidden(tokens_BT, _positions(segments), choice_BTLK)
        return TrainOutputs(hidden_BTD, [], torch.zeros((), device=tokens_BT.device))

    @torch.no_grad()
    def chosen_experts(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        with recording(self.routers) as chosen:
            self.train_outputs(tokens_BT, segments)
        return torch.stack(chosen, 1).unflatten(0, tokens_BT.shape)

    @torch.no_grad()
    def keeps_segments(self) -> bool:
        """It is tried: the second of two texts in a row must have the hidden states that it has alone."""
        ids_BT = torch.arange(2, 26, device=self.embed.weight.device)[None] % self.cfg.vocab_size
        segments_BT = torch.arange(24, device=ids_BT.device)[None] // 12
        packed, seen, alone = (
            self.train_outputs(tokens_BT, segments).hidden_BTD[:, -12:].float()
            for tokens_BT, segments in ((ids_BT, segments_BT), (ids_BT, None), (ids_BT[:, 12:], None))
        )
        return bool((packed - alone).norm() <= 0.1 * (seen - alone).norm())

    def scorer(self, seed: int) -> CausalScorer:
        """The same body, not copied, with a new head. Raises UserError if transformers has no such model."""
        return CausalScorer.of(self, seed)

    def save(
        self, directory: str | Path, *, tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None
    ) -> None:
        with self._new_directory(Path(directory), tokenizer_dir, files) as fresh:
            self._write_with_transformers(fresh)
            reloaded = _read(fresh, next(self.parameters()).dtype, self.auto).state_dict()
            for name, tensor in self.inner.state_dict().items():
                if not torch.equal(reloaded[name], tensor.to(reloaded[name].device)):
                    raise UserError(f"{fresh}: tensor {name} reads back differently from what was written")

    @contextmanager
    def _new_directory(
        self, directory: Path, tokenizer_dir: str | Path | None, files: dict[str, str] | None
    ) -> Iterator[Path]:
        with replacing(directory, () if tokenizer_dir is None else deepseek.REPLACED) as fresh:
            if tokenizer_dir is not None:
                deepseek.copy_files(Path(tokenizer_dir), fresh, deepseek.TOKENIZER_FILES)
            for name, text in (files or {}).items():
                (fresh / name).write_text(text, "utf-8")
            yield fresh

    def _write_with_transformers(self, fresh: Path, **options: Any) -> None:
        try:
            self.inner.save_pretrained(fresh, **options)
        except ValueError as error:  # generation settings that contradict each other
            raise UserError(f"{fresh}: transformers does not write this model: {_first_line(error)}") from None

    def exports(self) -> list[ExportedTensor]:
        """The tensors of a model directory, each from tensors of this model, so that a sharded model is written one
        tensor at a time. The model may be without storage."""
        tied = {name for name, _ in self.inner.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in self.inner.named_parameters()}
        left_out = tied | set(self.inner._keys_to_ignore_on_save or ())
        return [tensor for tensor in self._plain_tensors() if tensor.key not in left_out]

    def adapter_exports(self) -> list[ExportedTensor]:
        """Those of the adapter that is written next to the directory."""
        return []

    def has_plain_tensors(self) -> bool:
        """Whether the files that transformers writes hold exactly `exports`; it stores the experts of some families in
        another form, and needs all tensors at once for that."""
        from transformers.core_model_loading import revert_weight_conversion

        shapes = {item.key: item.shape for item in self.exports()}
        stored = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        try:
            written = revert_weight_conversion(self.inner, stored)
        except Exception:  # what it computes needs storage
            return False
        return {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes

    def _plain_tensors(self) -> list[ExportedTensor]:
        return [
            ExportedTensor(name, tuple(tensor.shape), (f"inner.{name}",))
            for name, tensor in self.inner.state_dict().items()
        ]

    def write(
        self, directory: Path, plan: Sequence[ExportedTensor], tensors: Iterable[Tensor], dtype: torch.dtype, *,
        adapter: Mapping[str, Tensor], tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`save` from a stream of the tensors of `exports`; the model itself may be without storage."""
        specs = [TensorSpec(item.key, dtype, item.shape) for item in plan]
        with self._new_directory(directory, tokenizer_dir, files) as fresh:
            self.inner.config.dtype = dtype
            self.inner.config.architectures = [type(self.inner).__name__]
            self.inner.config.save_pretrained(fresh)
            if self.inner.can_generate():
                self.inner.generation_config.save_pretrained(fresh)
            verify(fresh, specs, write_tensors(fresh, specs, tensors, deepseek.SHARD_BYTES))


class CausalScorer(CausalLM):
    """A transformers model with a scalar head, on disk `...ForSequenceClassification` with one label.

    transformers reads the score at a text's last token that is not padding. If texts end with the padding token, the
    saved config has no `pad_token_id`: transformers then refuses batches instead of reading one token too early.
    """

    auto = "AutoModelForSequenceClassification"
    head = "score"

    @classmethod
    @torch.no_grad()
    def of(cls, model: CausalLM, seed: int) -> CausalScorer:
        config, body = copy.deepcopy(model.inner.config), model.inner.base_model
        config.num_labels = 1
        config.id2label, config.label2id = {0: "REWARD"}, {"REWARD": 0}
        try:
            with torch.device("meta"):
                inner = getattr(transformers_library(), cls.auto).from_config(config, trust_remote_code=False)
        except ValueError:
            inner = None
        head = getattr(inner, cls.head, None)
        if inner is None or type(inner.base_model) is not type(body) or not isinstance(head, nn.Linear):
            raise UserError(
                f"transformers has no {config.model_type} model that scores text with a single matrix, so it cannot "
                "become a reward model; start from a model of another family, such as Llama or Qwen"
            )
        std = getattr(config, "initializer_range", 0.02)
        fresh = torch.empty(1, model.cfg.dim).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        setattr(inner, inner.base_model_prefix, body)
        head.weight = nn.Parameter(fresh.to(model.embed.weight))
        return cls(inner)

    def forward(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        """Scores of every prefix, [B, T], in float32."""
        return scores(self.train_outputs(tokens_BT, segments).hidden_BTD, self.head_weight)

    @contextmanager
    def _new_directory(
        self, directory: Path, tokenizer_dir: str | Path | None, files: dict[str, str] | None
    ) -> Iterator[Path]:
        if tokenizer_dir is not None and (Path(tokenizer_dir) / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(tokenizer_dir)
            end = render_ids(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])[-1]
            self.inner.config.pad_token_id = None if end == tokenizer.pad_id else tokenizer.pad_id
        with super()._new_directory(directory, tokenizer_dir, files) as fresh:
            yield fresh


_Kind = TypeVar("_Kind", bound=CausalLM)


def load(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu",
    kind: type[_Kind] = CausalLM,  # type: ignore[assignment]
) -> _Kind:  # fmt: skip
    """A transformers model. dtype: of all parameters (None: as stored). On the device "meta" it has no weights, and
    nothing is computed to check it. Raises UserError if it is not of `kind`."""
    directory = Path(directory)
    _check_files(directory)
    values = read_object(directory / "config.json")
    if values.get("quantization_config"):
        raise UserError(f"{directory} has quantised weights, which cannot be trained; use the original ones")
    check_finished(directory)
    if (directory / ADAPTER_CONFIG).exists():
        raise UserError(f"{directory} holds an adapter besides the model; merge the two, or remove adapter_config.json")
    deepseek.check_kind(values, kind.head is not None, directory)
    checkpoint = Checkpoint(directory)  # refuses pickles, and names what is damaged
    with _explained(directory):
        _check_counts(values, checkpoint)
        _check_memory(directory, checkpoint, kind.auto)
        if torch.device(device).type == "meta":
            return kind(_without_weights(directory, kind.auto, deepseek.parse_dtype(dtype)))
        return checked(kind(_read(directory, deepseek.parse_dtype(dtype), kind.auto).to(device)), str(directory))


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turns anything that transformers raises for a foreign directory into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{directory}: transformers {transformers_library().__version__} cannot read this model "
            f"({_first_line(error)}). Code that comes with a model is never run; a newer transformers may know the "
            "architecture"
        ) from error


def _check_counts(values: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raises UserError for numbers in config.json that would build lists larger than the files can fill: above all
    counts of layers and experts, which have many names."""
    n = len(checkpoint.entries)
    stacked = [entry.shape[0] for entry in checkpoint.entries.values() if entry.size and len(entry.shape) == 3]
    for key, value in values.items():
        if isinstance(value, dict):
            _check_counts(value, checkpoint)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = max(checkpoint.widest, MOST_OTHERS)
        if PER_LAYER.match(key):
            most = max(n, FEW)
        elif PER_EXPERT.match(key):
            most = max(n, FEW, *stacked)
        elif ALONG_TEXT.search(key):
            most = LONGEST
        if not -1 <= value <= most:
            raise UserError(
                f"{checkpoint.directory}: config.json has {key} = {value}, but the {n} tensors in the files allow at "
                f"most {most}"
            )


def _check_memory(directory: Path, checkpoint: Checkpoint, kind: str) -> None:
    """Raises UserError for a network much larger than the files: transformers would initialise the rest at random."""
    inner = _without_weights(directory, kind)
    stored = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    needed = sum(parameter.numel() for parameter in inner.parameters())
    if needed > 2 * stored:
        raise UserError(
            f"{directory}: config.json describes {needed} parameters, but the files hold {stored}; the two do not match"
        )
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in inner.buffers())
    if buffer_bytes > max(SPARE_BYTES, 2 * stored):
        raise UserError(f"{directory}: config.json requires tables of {buffer_bytes} bytes besides the parameters")


def _without_weights(directory: Path, kind: str, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of a directory on the device "meta"."""
    config = _config(directory)
    if kind == CausalScorer.auto:
        config.num_labels = 1
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return getattr(transformers_library(), kind).from_config(config, trust_remote_code=False, **options)


@torch.no_grad()
def checked(model: _Kind, where: str) -> _Kind:
    """Returns the model after checking the invariants on six tokens."""
    device = model.embed.weight.device
    tokens_BT = (torch.arange(6, device=device) * 7 % model.cfg.vocab_size)[None]
    ours = model(tokens_BT)
    if model.head is None and not _is_close(
        ours, model.inner(input_ids=tokens_BT, use_cache=False).logits.to(ours.dtype)
    ):
        raise UserError(
            f"{where}: {model.cfg.model_type} does more to its logits than multiply the head by the hidden state (a "
            "bias, a scale or a cap); such a model is not supported"
        )
    packed = model(tokens_BT, torch.tensor([[1, 1, 2, 2, 2, 2]], device=device))
    alone = torch.cat((model(tokens_BT[:, :2]), model(tokens_BT[:, 2:])), 1)
    if not _is_close(packed, alone):
        raise UserError(
            f"{where}: transformers lets packed samples of {model.cfg.model_type} see each other; such a model is not "
            "supported (a newer transformers may separate them)"
        )
    return model


def transformers_library() -> ModuleType:
    """The transformers library; raises UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError("models of other architectures need transformers: pip install 'bessemer[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _config(directory: Path) -> Any:
    """config.json without its choice of attention and expert kernels, which transformers may download and run."""
    options = {"local_files_only": True, "trust_remote_code": False}
    config = transformers_library().AutoConfig.from_pretrained(directory, **options)
    config._attn_implementation = config._experts_implementation = None
    return config


def _read(directory: Path, dtype: torch.dtype | None, kind: str) -> Any:
    """The transformers model of a directory; raises UserError unless its tensors are exactly those of the files."""
    inner, report = getattr(transformers_library(), kind).from_pretrained(
        directory, config=_config(directory), dtype=dtype or "auto", local_files_only=True, trust_remote_code=False,
        use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = (item if isinstance(item, str) else item[0] for item in report.get(kind) or ())
        if listed := sorted(names):
            more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
            raise UserError(f"{directory}: {kind.removesuffix('_keys')} tensor {listed[0]}{more}; download it again")
    return inner


def _config_of(inner: Any, head: Any, routers: Sequence[Any]) -> CausalLMConfig:
    config = inner.config
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if kinds or getattr(inner, "_is_stateful", False):
        raise UserError(f"{config.model_type} is not supported: its memory is {', '.join(kinds) or 'a state'}")
    if not isinstance(head, nn.Linear) or head.bias is not None or inner.base_model is inner:
        raise UserError(f"{config.model_type} is not supported: its head is not a single matrix")
    limits = {name: getattr(config, name, None) for name in LIMITS}
    if limits["max_position_embeddings"] is None:
        raise UserError(f"{config.model_type} is not supported: config.json has no max_position_embeddings")
    rows, dim = inner.get_input_embeddings().weight.shape
    return CausalLMConfig(
        model_type=config.model_type, vocab_size=rows, dim=dim, n_layers=config.num_hidden_layers,
        max_seq_len=longest_text(config.to_dict() | limits),
        n_routed_experts=max((router.num_experts for router in routers), default=0),
    )  # fmt: skip


def _positions(segments: Segments) -> Tensor | None:
    """Position of each token within its segment; transformers takes every position of 0 as a new segment."""
    if segments is None:
        return None
    segments_BT = segments.segments_BT if isinstance(segments, Packed) else segments
    place_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return place_T - torch.where(begins_BT, place_T, 0).cummax(1).values


def _is_close(ours: Tensor, reference: Tensor) -> bool:
    bound = CLOSE if ours.dtype == torch.float32 else 30 * CLOSE
    return bool((ours - reference).float().norm() <= bound * reference.float().norm())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_files(directory: Path) -> None:
    """Applies `check_regular` to everything in a directory that a library might open, and `MOST` to its JSON."""
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and not path.is_dir():
            size = check_regular(path)
            if path.suffix != ".safetensors" and size > MOST:
                raise UserError(f"{path} has {size} bytes; the limit is {MOST}; {AGAIN}")
