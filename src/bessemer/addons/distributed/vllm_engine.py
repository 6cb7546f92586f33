"""vLLM in a rollout worker, behind the interface of `ray_worker.WorkerEngine`. Run with vLLM 0.32 on CPUs
(`bench/vllm_agrees.py`); on GPUs written against the sources of 0.33 and not yet run.

Weights are loaded under Hugging Face names (`vllm_weights`), and vLLM's prefix cache, which belongs to older weights,
is dropped. vLLM computes in BF16, on CPUs in float32, and has its own random streams: a sample is a function of its key
and the weights, but differs from our Engine's, and its log-probabilities differ from the trainer's by rounding, which
`correction` corrects.

Its log-probabilities ("processed") are of the distribution that it samples from. With top_p that is the truncated one,
so RL needs the tokens that truncation left (`kept_of`), on which the trainer renormalises.

Routed experts and sampling masks need the runner for GPUs: they are read from the classes of 0.32 and 0.33, and not yet
run. Adapters are exchanged as files, one folder for each set (`AdapterFiles`).
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer import system
from bessemer.addons.distributed.ray_settings import DEFAULTS, VLLMOptions
from bessemer.addons.distributed.vllm_weights import (
    AdapterFiles,
    FileWeights,
    MappedWeights,
    ReopenedWeights,
    WeightLoader,
    settings,
    transfers,
)
from bessemer.engine.generation import Completion, GenerationBatch
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.engine.sequence import Request, cut_at_stop
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.mapping import slots
from bessemer.hf.model_directory import own_config
from bessemer.model.config import ModelConfig

MLA_WIDTHS = (512, 64)
"""Latent and rotary width that vLLM's fast MLA kernels are written for."""
MLA_OFF = "VLLM_MLA_DISABLE"
MOST_KEPT = 1024
"""Most tokens that a sampling mask may keep at a position: with masks, the likeliest of them are drawn from."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
KEY_BITS = (1 << 63) - 1
"""vLLM's seeds must not be negative."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a worker has the cores that Ray gives it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine ends with the worker, however that ends
}
"""Read when vLLM is imported or its engine is created; a user's own values win."""


class VLLMEngine:
    """One vLLM engine over `gpus` GPUs."""

    def __init__(self, directory: Path, gpus: int, options: VLLMOptions = DEFAULTS) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if mla_off(config):
            os.environ.setdefault(MLA_OFF, "1")  # read when the engine is created
        system.without_segments()  # its memory pool, if it sleeps, refuses them
        if not gpus:
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError:
            raise UserError("rollout.engine = \"vllm\" needs vLLM: pip install 'bessemer[vllm]'") from None
        if not gpus and not current_platform.is_cpu():
            raise UserError("this vLLM is built for GPUs, but Ray has none: add some, or install its build for CPUs")
        self.params = SamplingParams
        self.tokenizer = load_tokenizer(directory)
        self.directory, self.cfg = directory, own_config(directory)
        self.routed = self.cfg or routed_sizes(config)
        mapped = bool(gpus) and not options.lora_rank and transfers(LLM)
        self.kind = LLM
        self.arguments = {**llm_arguments(gpus, options), **settings(mapped), "tokenizer": str(directory)}
        try:
            self.llm = self.kind(model=str(directory), **self.arguments)
        except (TypeError, ValueError) as error:
            raise unable(options, error) from error
        self.adapters = AdapterFiles() if options.lora_rank else None
        self.weights: WeightLoader
        if not gpus:
            self.weights = ReopenedWeights(self._reopen, directory / "config.json")
        elif mapped:
            self.weights = MappedWeights(self.llm, gpus)
        else:
            self.weights = FileWeights(self.llm, directory / "config.json")
        self.options, self.asleep = options, False
        self.dtype = self.arguments["dtype"]

    def load(self, weights: Mapping[str, Tensor], adapter: str = "") -> None:
        """New weights of the whole model, or of adapters on it with the text of their adapter_config.json."""
        self._wake()
        if self.adapters is None:
            self.weights.load(hub_state(weights, self.cfg, self.directory))
        else:
            self.adapters.write(weights, adapter)
        self.llm.reset_prefix_cache()

    def sleeps_empty(self) -> bool:
        """Whether the weights are gone, and must be loaded before the next batch."""
        return self.asleep and self.options.sleep_level == 2

    def score(self, ids: Sequence[int]) -> list[float]:
        self._wake()
        params = self.params(max_tokens=1, temperature=1.0, top_k=1, seed=0, prompt_logprobs=0, detokenize=False)
        (output,) = self._ask([{"prompt_token_ids": list(ids)}], params)
        return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]

    def _reopen(self, folder: Path) -> None:
        """A new engine with the weights in `folder`; the old one is gone before it starts."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        self.llm = self.kind(model=str(folder), **self.arguments)

    def run(self, batch: GenerationBatch) -> list[Completion]:
        check_length(batch, self.options.max_model_len)
        self._wake()
        try:
            return self._generate(batch)
        finally:
            if self.options.sleep:
                self.llm.sleep(level=self.options.sleep_level)
                self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _generate(self, batch: GenerationBatch) -> list[Completion]:
        prompts = [{"prompt_token_ids": list(sample.request.prompt)} for sample in batch.samples]
        most_kept = MOST_KEPT if self.options.records_kept else 0
        params = [self.params(**sampling_params(sample.request, most_kept)) for sample in batch.samples]
        outputs = self._ask(prompts, params)
        pairs = zip(batch.samples, outputs, strict=True)
        return [self._completion(sample.request, output.outputs[0], batch) for sample, output in pairs]

    def _ask(self, prompts: Sequence[Any], params: Any) -> Any:
        request = None if self.adapters is None else self.adapters.request()
        return self.llm.generate(prompts, params, use_tqdm=False, lora_request=request)

    def _completion(self, request: Request, output: Any, batch: GenerationBatch) -> Completion:
        tokens = array("i", output.token_ids)
        logprobs = array("f", (step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)))
        return Completion(
            tokens=tokens,
            text=cut_at_stop(self.tokenizer.decode(tokens), request.stop_strings),
            logprobs=logprobs,
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            prompt_tokens=len(request.prompt),
            routing=routing_of(output, self.routed, len(request.prompt)) if batch.record_routing else None,
            kept=kept_of(output) if batch.record_kept else None,
        )


class RoutedSizes(NamedTuple):
    """The part of `ModelConfig` that `routing_of` needs, of a model of another family."""

    n_layers: int
    n_dense_layers: int
    n_routed_experts: int
    n_activated_experts: int


def routed_sizes(config: Mapping[str, Any]) -> RoutedSizes | None:
    """Of a config.json; None if its dense layers do not come first, or if it has no experts."""
    layers, dense = int(config.get("num_hidden_layers", 0)), config.get("mlp_only_layers") or []
    experts = config.get("num_experts") or config.get("num_local_experts")
    if not experts or config.get("decoder_sparse_step", 1) != 1 or sorted(dense) != [*range(len(dense))]:
        return None
    return RoutedSizes(layers, len(dense), int(experts), int(config["num_experts_per_tok"]))


def routing_of(output: Any, cfg: ModelConfig | RoutedSizes | None, prompt_tokens: int) -> Tensor:
    """`Completion.routing` of a `vllm.outputs.CompletionOutput`, which has the experts [T, L, K] of all tokens but the
    last, in every layer, with zeros in dense ones. UserError if they are not there."""
    experts = getattr(output, "routed_experts", None)
    if experts is None:
        raise missing("routed_experts", "routing-replay")
    experts = np.asarray(experts)
    fed = prompt_tokens + len(output.token_ids) - 1
    if cfg is None or experts.shape != (fed, cfg.n_layers, cfg.n_activated_experts):
        expected = "a model of another family" if cfg is None else (fed, cfg.n_layers, cfg.n_activated_experts)
        raise UserError(f"vLLM returned routed_experts of shape {experts.shape}, where {expected} was expected")
    dtype = np.uint8 if cfg.n_routed_experts <= 256 else np.int16
    return torch.from_numpy(experts[:, cfg.n_dense_layers :].astype(dtype))


def kept_of(output: Any) -> KeptTokens:
    """`Completion.kept` of a `vllm.outputs.CompletionOutput`. UserError if it has no sampling mask."""
    mask = getattr(output, "sampling_mask", None)
    if mask is None or len(mask.token_ids) != len(output.token_ids):
        raise missing("sampling_mask", "top_p below 1")
    ids = [sorted(kept) for kept in mask.token_ids]
    return KeptTokens.of(array("i", (token for kept in ids for token in kept)), array("i", map(len, ids)))


def missing(field: str, needs: str) -> UserError:
    return UserError(
        f"vLLM returned no {field}, which {needs} needs: install vLLM 0.33 with its runner for GPUs (V2), or set "
        'rollout.engine = "ray"'
    )


def unable(options: VLLMOptions, error: Exception) -> UserError:
    """Why an engine could not be made with what the stage needs."""
    needs = {
        "routed experts (routing-replay)": options.records_routing,
        "sampling masks (top_p)": options.records_kept,
        "adapters (lora)": bool(options.lora_rank),
        "sleep": bool(options.sleep),
    }
    named = ", ".join(name for name, needed in needs.items() if needed)
    reason = " ".join(str(error).split()).partition(" [type=")[0][:300]
    return UserError(f"this vLLM cannot be started{f' with {named}' if named else ''}: {reason}")


def mla_off(config: Mapping[str, Any]) -> bool:
    """Whether a model (its config.json) has MLA with widths that vLLM's fast kernels do not support; vLLM then computes
    with per-head keys and values."""
    widths = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    return widths[0] is not None and widths != MLA_WIDTHS


def llm_arguments(gpus: int, options: VLLMOptions) -> dict[str, Any]:
    """Arguments of `vllm.LLM` beside the model. gpus 0: a build of vLLM for CPUs."""
    arguments: dict[str, Any] = dict(
        logprobs_mode="processed_logprobs",  # under softmax(logits / temperature), as the trainer computes them
    )
    if gpus:
        arguments |= dict(
            dtype="bfloat16", tensor_parallel_size=gpus, gpu_memory_utilization=options.gpu_memory_utilization
        )
    else:
        arguments |= dict(
            dtype="float32",
            enforce_eager=True,
            compilation_config={"custom_ops": ["none"]},  # in 0.32 its interleaved RoPE is wrong for several heads
            enable_chunked_prefill=False,  # a part of a prompt rewinds the sample's generator, which CPUs cannot
        )
    if gpus > 1:
        arguments["distributed_executor_backend"] = "mp"  # on this worker's own GPUs, not elsewhere in Ray
    if options.max_model_len is not None:
        arguments["max_model_len"] = options.max_model_len
    if options.sleep:
        arguments["enable_sleep_mode"] = True
    if options.records_routing:
        arguments["enable_return_routed_experts"] = True
    if options.records_kept:
        arguments["return_sampling_mask"] = True
    if options.lora_rank:
        arguments |= dict(enable_lora=True, max_loras=1, max_lora_rank=lora_ranks(options.lora_rank))
    return arguments


def lora_ranks(rank: int) -> int:
    """The smallest of the ranks that vLLM has memory layouts for."""
    return next((known for known in LORA_RANKS if known >= rank), rank)


def check_length(batch: GenerationBatch, most: int | None) -> None:
    """UserError for a sample that may need more than `most` tokens."""
    needed = max(len(sample.request.prompt) + sample.request.max_new_tokens for sample in batch.samples)
    if most is not None and needed > most:
        raise UserError(
            f"rollout.max_model_len is {most}, but a prompt with its answer may have {needed} tokens: raise it, or "
            "lower max_new_tokens"
        )


def sampling_params(request: Request, most_kept: int = 0) -> dict[str, Any]:
    """A request as arguments of vLLM's SamplingParams. `most_kept`: of an engine that reports sampling masks, which
    takes no greedy request and wants a bound on the mask's size."""
    sampling = request.sampling
    temperature, top_k = sampling.temperature, sampling.top_k
    if most_kept:
        temperature, top_k = (temperature, min(top_k or most_kept, most_kept)) if temperature else (1.0, 1)
    params: dict[str, Any] = dict(
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=top_k,
        min_p=sampling.min_p,
        seed=request.key & KEY_BITS,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=bool(request.stop_strings),
    )
    return params | ({"stop": list(request.stop_strings)} if request.stop_strings else {})


def _stored(state: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """The weights as transformers stores them, which is what vLLM reads: the experts of some families are one tensor
    each there, and stacked where they compute."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return revert_weight_conversion(model, {name.removeprefix("inner."): tensor for name, tensor in state.items()})


def hub_state(state: Mapping[str, Tensor], cfg: ModelConfig | None, directory: Path) -> dict[str, Tensor]:
    """Weights under their names on disk, without MTP modules; cfg None: a model of another family in `directory`."""
    if cfg is None:
        return {name: tensor.contiguous() for name, tensor in _stored(state, directory).items()}
    main = [slot for slot in slots(cfg) if not slot.copy and not slot.name.startswith("mtp.")]
    return {slot.key: slot.of(dict(state)).contiguous() for slot in main}
