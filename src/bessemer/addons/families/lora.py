"""LoRA: low-rank adapters on a frozen model of another family (Hu et al. 2021), using the peft library (extra `lora`).

    y = W x + alpha / rank * B (A x)       W frozen; A random, B zero at the start, so that the model begins as the base

`attach` puts peft's layers into a `CausalLM`. Everything else sees a model with few trainable parameters: optimizer,
checkpoints and GRPO's reference hold only the adapters, and the engine samples from base and adapters with the
trainer's own forward. `LoRAModel.save` writes the merged weights, a plain model for the next stage, and next to them
the folder `adapter` in peft's format. As everywhere in `CausalLM`, there is no dropout.

Invariants
- A base is never written to. `merged` shares every weight that no adapter changes.
- A foreign adapter is data: `merge` reads the few facts of its config that it knows and refuses the rest.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bessemer.addons.families.causal_lm import CausalLM, CausalScorer, ExportedTensor, load
from bessemer.config.table import nearest
from bessemer.config.training import LoRAConfig
from bessemer.data.fingerprints import sha256_of_all
from bessemer.data.model_files import read_object
from bessemer.errors import UserError
from bessemer.hf.mapping import is_reward_model
from bessemer.hf.replace import ADAPTER_CONFIG, replacing
from bessemer.hf.safetensors_reader import cast, read_header
from bessemer.hf.safetensors_writer import write_json
from bessemer.model.protocol import LanguageModel

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from transformers import PreTrainedModel

ADAPTER = "adapter"
"""Folder next to a stage's model directory."""
WEIGHTS, BASE = "adapter_model.safetensors", "base.json"
NAME = "default"
"""peft's name for the only adapter; omitted in files."""
PREFIX = "base_model.model."
"""Prefix that peft adds to the names of a model's modules."""
ONLY_PEFT = "only peft can merge it (merge_and_unload)"
NOT_PORTABLE = "; the stage leaves the merged model alone, since peft would put such an adapter on the stacked experts"
UNDERSTOOD = frozenset({"init_lora_weights", "r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out"})
SAVED = ["classifier", "score"]
"""`modules_to_save` of an adapter with a scalar head, as peft writes it for the task SEQ_CLS."""
ABOUT = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
        "auto_mapping", "lora_dropout", "loftq_config", "runtime_config", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip
"""Keys of adapter_config.json that do not change what a trained adapter computes."""


class LoRAModel(CausalLM):
    """A `CausalLM` with adapters, which alone are trainable."""

    plain: type[CausalLM] = CausalLM
    task = "CAUSAL_LM"

    def __init__(self, inner: PreTrainedModel, config: LoRAConfig, base: Path, portable: bool = True):
        """`portable`: whether peft, given the same targets, adapts the same matrices, and so can read the adapter."""
        super().__init__(inner)
        self.config, self.base, self.portable = config, base, portable
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_(_is_trained(name))

    def adapters(self) -> dict[str, Tensor]:
        """The adapters' weights by the names that peft uses in files."""
        return {
            _peft_name(name): parameter.detach()
            for name, parameter in self.inner.named_parameters()
            if _is_trained(name)
        }

    def frozen(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters(remove_duplicate=False)  # a tied weight has several names
        return {name: parameter for name, parameter in named if not _is_trained(name)}

    @torch.no_grad()
    def merged(self) -> CausalLM:
        """A plain model that computes the same: W + alpha / rank * B A, added in float32 and rounded to W's dtype."""
        plain = copy.deepcopy(self.inner, {id(parameter): parameter for parameter in self.frozen().values()})
        for name, layer in [*_adapted(plain)]:
            weight = layer.base_layer.get_parameter("weight")
            changed = weight.float() + layer.get_delta_weight(NAME).float()
            layer.base_layer.weight = nn.Parameter(cast(changed, weight.dtype, name), requires_grad=False)
            plain.set_submodule(name, layer.base_layer)
        return self.plain(plain)

    def save(
        self, directory: str | Path, *, tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None
    ) -> None:
        """Writes the merged model as `CausalLM.save` does, and the adapter, if it is portable, to the folder `adapter`
        next to it."""
        if self.portable:
            self.save_adapter(Path(directory).with_name(ADAPTER))
        self.merged().save(directory, tokenizer_dir=tokenizer_dir, files=files)

    def _plain_tensors(self) -> list[ExportedTensor]:
        """As `merged` would have them."""
        layers, tensors = dict(_adapted(self.inner)), []
        for name, tensor in self.inner.state_dict().items():
            module = name.removesuffix(".base_layer.weight")
            if ".lora_" in name:
                continue
            sources, combine = [name], _as_it_is
            if name != module and module in layers:
                sources += [f"{module}.lora_{matrix}.{NAME}.weight" for matrix in "AB"]
                layer = layers[module]
                combine = partial(_merged, name, layer.scaling[NAME], layer.fan_in_fan_out)
            key, shape = name.replace(".base_layer.", "."), tuple(tensor.shape)
            tensors.append(ExportedTensor(key, shape, tuple(f"inner.{source}" for source in sources), combine))
        return tensors

    def adapter_exports(self) -> list[ExportedTensor]:
        return [
            ExportedTensor(_peft_name(name), tuple(parameter.shape), (f"inner.{name}",))
            for name, parameter in self.inner.named_parameters()
            if _is_trained(name)
        ]

    def write(
        self, directory: Path, plan: Sequence[ExportedTensor], tensors: Iterable[Tensor], dtype: torch.dtype, *,
        adapter: Mapping[str, Tensor], **options: Any,
    ) -> None:  # fmt: skip
        if self.portable:
            self.save_adapter(directory.with_name(ADAPTER), adapter)
        super().write(directory, plan, tensors, dtype, adapter={}, **options)

    def save_adapter(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Atomically writes peft's two files and `base.json`, which holds the SHA-256 of the base's weights. `weights`:
        those of `adapters`, if this model is without storage."""
        weights = self.adapters() if weights is None else weights
        targets = sorted({name.split(".")[-3] for name in weights if ".lora_" in name})
        values = _peft_config(self.config, targets, self.task).to_dict()
        values |= {"base_model_name_or_path": str(self.base.absolute()), "inference_mode": True}
        listed = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(values.items())}
        with replacing(directory) as fresh:
            write_json(fresh / ADAPTER_CONFIG, listed)
            write_json(fresh / BASE, {"sha256": _fingerprint(self.base)})
            with open(fresh / WEIGHTS, "wb") as file:
                # each by itself, not as a view of the optimizer's vectors
                alone = {name: tensor.cpu().clone() for name, tensor in weights.items()}
                file.write(safetensors.torch.save(alone, {"format": "pt"}))
                file.flush()
                os.fsync(file.fileno())


class LoRAScorer(LoRAModel, CausalScorer):
    """A reward model with adapters. Its head is trained in full and stored with them, as in peft (SEQ_CLS)."""

    plain, task = CausalScorer, "SEQ_CLS"


def check_installed() -> None:
    """Raises UserError if peft is not installed."""
    if find_spec("peft") is None:
        raise UserError("LoRA adapters need the peft library: pip install 'bessemer[lora]'")


def attach(network: LanguageModel, config: LoRAConfig, seed: int, base: Path, stage: str) -> LoRAModel:
    """The model with new adapters, whose A matrices are drawn with `seed`. `base`: the directory it was read from.
    Raises UserError for targets that the model lacks."""
    assert isinstance(network, CausalLM)
    known = _matrices(network)
    targets = sorted(known) if config.targets == "all-linear" else [*config.targets]
    for target in targets:
        if target not in known:
            raise UserError(
                f'stage "{stage}": lora.targets names "{target}", but no matrix in the layers of {base} has that name; '
                f"{nearest(target, sorted(known))}"
            )
    return _inject(network, config, targets, seed, base)


def describe(model: LoRAModel) -> str:
    """What is trained, in one line, and which matrices "all-linear" leaves out: experts stacked in one parameter. Also
    whether the stage will leave no adapter."""
    stacked = sorted({".".join(name.split(".")[-2:]) for name, base in model.frozen().items() if base.dim() == 3})
    left = f"; frozen, since stacked: {', '.join(stacked)}" if stacked and model.config.targets == "all-linear" else ""
    trained = sum(tensor.numel() for tensor in model.adapters().values())
    every = sum(parameter.numel() for parameter in model.parameters())
    places = len([*_adapted(model.inner)])
    return (
        f"LoRA of rank {model.config.rank}, alpha {model.config.alpha}, on {places} matrices: {trained:,} of {every:,} "
        f"parameters are trained ({trained / every:.1%}){left}{'' if model.portable else NOT_PORTABLE}"
    )


def merge(adapter: Path, target: Path, base: Path | None = None, dtype: str | None = None) -> None:
    """Merges an adapter directory into its base and writes a plain model directory. `base`: by default the one that the
    adapter's config names; `dtype`: of the result, by default the base's. Raises UserError for an adapter of another
    base, or with more than LoRA's matrices."""
    check_installed()
    values = read_object(adapter / ADAPTER_CONFIG)
    config = _understood(values, adapter)
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter} has no {WEIGHTS}; save it again with peft as safetensors")
    stored = read_header(adapter / WEIGHTS)
    places = sorted({name.split(".lora_")[0].removeprefix(PREFIX) for name in stored if ".lora_" in name})
    first = [entry for name, entry in stored.items() if name.partition(".lora_")[2].startswith(("A.", "embedding_A"))]
    ranks = {n for entry in first if entry.size for n in entry.shape[:1]}
    if ranks != {config.rank}:  # peft would allocate what is declared
        raise UserError(
            f"{adapter}: adapter_config.json declares rank {config.rank}, but the stored matrices have "
            f"{', '.join(map(str, sorted(ranks))) or 'none'}; copy the adapter again"
        )
    base = Path(str(values.get("base_model_name_or_path"))) if base is None else base
    if not (base / "config.json").is_file():
        raise UserError(f"there is no model at {base}, the base of {adapter}; name its directory with --like")
    if (adapter / BASE).is_file() and read_object(adapter / BASE).get("sha256") != _fingerprint(base):
        raise UserError(f"{adapter} was not trained on {base}: the SHA-256 of the weights differs")
    rewards = is_reward_model(read_object(base / "config.json"))
    model: CausalLM = load(base, dtype, kind=CausalScorer if rewards else CausalLM)
    if values.get("task_type") == LoRAScorer.task and model.head is None:
        model = CausalScorer.of(model, 0)  # its new head is the adapter's
    modules, matrices = {name for name, _ in model.inner.named_modules()}, _matrices(model)
    for module in places:
        if module not in modules:
            raise UserError(f"{adapter} belongs to another base: {base} has no matrix {module}")
        if module.split(".")[-1] not in matrices:
            raise UserError(f"{adapter} changes {module}, which is not in the layers of {base}; {ONLY_PEFT}")
    adapted = _inject(model, config, places, 0, base, bool(values.get("use_rslora")))
    own = adapted.adapters()
    for name in sorted(stored.keys() | own.keys()):
        present, expected = (
            str([*tensors[name].shape]) if name in tensors else "not there" for tensors in (stored, own)
        )
        if present != expected:
            raise UserError(f"{adapter} does not fit {base}: {name} is {present}, but should be {expected}")
    for name, tensor in safetensors.torch.load_file(adapter / WEIGHTS).items():
        if not own[name].copy_(tensor).isfinite().all():
            raise UserError(f"{adapter}: {name} has values that are not finite; copy or train the adapter again")
    adapted.merged().save(target, tokenizer_dir=base)


def _understood(values: Mapping[str, object], adapter: Path) -> LoRAConfig:
    """The settings of an adapter_config.json. peft itself would import modules that such a file names."""
    if values.get("peft_type") != "LORA":
        raise UserError(f"{adapter} is an adapter of type {values.get('peft_type')}; only LORA can be merged here")
    if values.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise UserError(f"{adapter} began by changing its base ({values['init_lora_weights']}); {ONLY_PEFT}")
    for key, value in values.items():
        if key == "modules_to_save" and values.get("task_type") == LoRAScorer.task and isinstance(value, list):
            value = [name for name in value if name not in SAVED]  # peft names them again at every save
        if key not in UNDERSTOOD | ABOUT and value not in (None, False, [], {}, "none"):
            raise UserError(f"{adapter}: adapter_config.json sets {key}; {ONLY_PEFT}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    alpha = int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha
    if type(rank) is not int or rank < 1 or type(alpha) is not int or alpha < 1:
        raise UserError(f"{adapter}: r and lora_alpha must be whole numbers of at least 1, not {rank} and {alpha}")
    return LoRAConfig(rank=rank, alpha=alpha)


def _peft_config(config: LoRAConfig, targets: list[str], task: str, rslora: bool = False) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, use_rslora=rslora, task_type=task,
        modules_to_save=SAVED if task == LoRAScorer.task else None,
    )  # fmt: skip


def _inject(
    model: CausalLM, config: LoRAConfig, targets: list[str], seed: int, base: Path, rslora: bool = False
) -> LoRAModel:
    from peft import inject_adapter_in_model

    asked = partial(_peft_config, config, targets, LoRAModel.task, rslora)
    # peft moves the targets of a module that has a `config` from dense MLPs to stacked experts
    holder = nn.Module()
    holder.inner = model.inner
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example that Conv1D stores its matrix transposed, which peft handles
        torch.manual_seed(seed)
        inject_adapter_in_model(asked(), holder)  # in place
        portable = _places_of_peft(model.inner, asked()) == {name for name, _ in _adapted(model.inner)}
    return (LoRAScorer if isinstance(model, CausalScorer) else LoRAModel)(model.inner, config, base, portable)


def _places_of_peft(inner: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The matrices that peft by itself adapts in a model like this one; empty if it refuses."""
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        skeleton = type(inner)(copy.deepcopy(inner.config))
        try:
            inject_adapter_in_model(config, skeleton)
        except ValueError:
            return set()
    return {name for name, _ in _adapted(skeleton)}


def _peft_name(name: str) -> str:
    """The name that peft uses in files."""
    return PREFIX + name.replace(f".{NAME}.weight", ".weight")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _merged(name: str, scaling: float, transposed: bool, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + scaling * B A, added in float32 and rounded to W's dtype."""
    change = scaling * (b.float() @ a.float())
    return cast(weight.float() + (change.T if transposed else change), weight.dtype, name)


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name.endswith(f"{CausalScorer.head}.weight")


def _matrices(model: CausalLM) -> set[str]:
    """The last name components of the linear layers, except the head."""
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, bool] = {}
    for name, module in model.inner.named_modules():
        last = name.split(".")[-1]
        fits = isinstance(module, nn.Linear | Conv1D) and module is not model.head_layer
        linear[last] = linear.get(last, True) and fits
    return {last for last, fits in linear.items() if fits}


def _adapted(inner: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Yields the layers with adapters and the names of the matrices that they change."""
    for name, module in inner.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _fingerprint(base: Path) -> str:
    """SHA-256 over the SHA-256s of the weight files."""
    return sha256("".join(sha256_of_all(sorted(base.glob("*.safetensors")))).encode()).hexdigest()
