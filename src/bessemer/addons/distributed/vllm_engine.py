"""vLLM in a rollout worker, behind the interface of `ray_worker.WorkerEngine`. Run with vLLM 0.32 on CPUs
(`bench/vllm_agrees.py`); on GPUs written against the sources of 0.33 and not yet run.

Weights are loaded under Hugging Face names (`vllm_weights`), and vLLM's prefix cache, which belongs to older weights,
is dropped. vLLM computes in BF16, on CPUs in float32, and has its own random streams: a sample is a function of its key
and the weights, but differs from our Engine's, and its log-probabilities differ from the trainer's by rounding, which
`correction` corrects.

Its log-probabilities ("processed") are of the distribution that it samples from. That is the trained one only if
nothing but the temperature changes the logits, so truncation and penalties are refused.
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bessemer import system
from bessemer.addons.distributed.ray_settings import DEFAULTS, VLLMSettings
from bessemer.addons.distributed.vllm_weights import (
    FileWeights,
    MappedWeights,
    ReopenedWeights,
    WeightLoader,
    settings,
    transfers,
)
from bessemer.engine.generation import Completion, GenerationBatch
from bessemer.engine.sequence import Request
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.mapping import slots
from bessemer.hf.model_directory import own_config
from bessemer.model.config import ModelConfig

MLA_WIDTHS = (512, 64)
"""Latent and rotary width that vLLM's fast MLA kernels are written for."""
MLA_OFF = "VLLM_MLA_DISABLE"
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

    def __init__(self, directory: Path, gpus: int, options: VLLMSettings = DEFAULTS) -> None:
        if mla_off(json.loads((directory / "config.json").read_text(encoding="utf-8"))):
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
        self.cfg = own_config(directory)
        mapped = bool(gpus) and transfers(LLM)
        self.kind, self.arguments = LLM, {**llm_arguments(gpus, options), **settings(mapped)}
        self.llm = self.kind(model=str(directory), **self.arguments)
        self.weights: WeightLoader
        if not gpus:
            self.weights = ReopenedWeights(self._reopen, directory / "config.json")
        elif mapped:
            self.weights = MappedWeights(self.llm, gpus)
        else:
            self.weights = FileWeights(self.llm, directory / "config.json")
        self.options, self.asleep = options, False
        self.dtype = self.arguments["dtype"]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._wake()
        self.weights.load(hub_state(weights, self.cfg))
        self.llm.reset_prefix_cache()

    def score(self, ids: Sequence[int]) -> list[float]:
        self._wake()
        params = self.params(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)
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
                self.llm.sleep(level=1)
                self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _generate(self, batch: GenerationBatch) -> list[Completion]:
        prompts = [{"prompt_token_ids": list(sample.request.prompt)} for sample in batch.samples]
        params = [self.params(**sampling_params(sample.request)) for sample in batch.samples]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        pairs = zip(batch.samples, outputs, strict=True)
        return [self._completion(sample.request, output.outputs[0]) for sample, output in pairs]

    def _completion(self, request: Request, output: Any) -> Completion:
        tokens = array("i", output.token_ids)
        logprobs = array("f", (step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)))
        return Completion(
            tokens=tokens,
            text=self.tokenizer.decode(tokens),
            logprobs=logprobs,
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            prompt_tokens=len(request.prompt),
        )


def mla_off(config: Mapping[str, Any]) -> bool:
    """Whether a model (its config.json) has MLA with widths that vLLM's fast kernels do not support; vLLM then computes
    with per-head keys and values."""
    widths = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    return widths[0] is not None and widths != MLA_WIDTHS


def llm_arguments(gpus: int, options: VLLMSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM` beside the model. gpus 0: a build of vLLM for CPUs."""
    arguments: dict[str, Any] = dict(
        skip_tokenizer_init=True,
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
    return arguments


def check_length(batch: GenerationBatch, most: int | None) -> None:
    """UserError for a sample that may need more than `most` tokens."""
    needed = max(len(sample.request.prompt) + sample.request.max_new_tokens for sample in batch.samples)
    if most is not None and needed > most:
        raise UserError(
            f"rollout.max_model_len is {most}, but a prompt with its answer may have {needed} tokens: raise it, or "
            "lower max_new_tokens"
        )


def sampling_params(request: Request) -> dict[str, Any]:
    """A request as arguments of vLLM's SamplingParams; UserError for an unsupported one."""
    if request.stop_strings:
        raise UserError(
            'rollout.engine = "vllm" ends answers at token ids only; leave stop strings to "ray" or "local"'
        )
    sampling = request.sampling
    if (sampling.top_p, sampling.top_k, sampling.min_p) != (1.0, 0, 0.0):
        raise UserError(
            'rollout.engine = "vllm" samples by temperature alone: with top_p, top_k or min_p its '
            "log-probabilities would not be the trained distribution's; leave them at their defaults, or set "
            'rollout.engine to "ray" or "local"'
        )
    return dict(
        temperature=sampling.temperature,
        seed=request.key & KEY_BITS,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def hub_state(state: Mapping[str, Tensor], cfg: ModelConfig | None) -> dict[str, Tensor]:
    """Weights under their names on disk, without MTP modules; cfg None: a model of another family."""
    if cfg is None:
        return {name.removeprefix("inner."): tensor.contiguous() for name, tensor in state.items()}
    main = [slot for slot in slots(cfg) if not slot.copy and not slot.name.startswith("mtp.")]
    return {slot.key: slot.of(dict(state)).contiguous() for slot in main}
