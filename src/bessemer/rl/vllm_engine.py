"""vLLM in a rollout worker, behind the interface of `ray_worker.WorkerEngine`. Not yet run: written against the API of
vLLM 0.33 without a GPU.

Weights go in by the documented route, as a checkpoint in Hugging Face's names in this node's memory and the workers'
`reload_weights`; vLLM's prefix cache belongs to older weights and is dropped. It computes in BF16 and has random
streams of its own: a sample is a function of its key and the weights, but not the sample of our Engine, and its
log-probabilities differ from the trainer's by rounding, which `correction` corrects.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bessemer.engine.engine import Completion, GenerationBatch
from bessemer.engine.sequence import Request
from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.hf.causal_lm import needs_transformers
from bessemer.hf.hf_tokenizer import load_tokenizer
from bessemer.hf.mapping import slots
from bessemer.model.config import ModelConfig
from bessemer.workers import SHARED

FILE = "model.safetensors"
KEY_BITS = (1 << 63) - 1
"""vLLM's seeds are not negative."""
UNKNOWN = float("nan")


class VLLMEngine:
    """One vLLM engine over `gpus` GPUs."""

    def __init__(self, directory: Path, gpus: int) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            raise UserError("rollout.engine = \"vllm\" needs vLLM: pip install 'bessemer[vllm]'") from None
        self.params = SamplingParams
        self.tokenizer = load_tokenizer(directory)
        self.cfg = None if needs_transformers(directory) else hub.read_config(directory)
        self.folder = Path(tempfile.mkdtemp(prefix="bessemer-weights-", dir=SHARED if Path(SHARED).is_dir() else None))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        shutil.copy(directory / "config.json", self.folder)
        self.llm = LLM(
            model=str(directory),
            dtype="bfloat16",
            tensor_parallel_size=gpus,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",  # under softmax(logits / temperature), as the trainer computes them
        )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(hub_state(weights, self.cfg), self.folder / FILE, metadata={"format": "pt"})
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        self.llm.reset_prefix_cache()

    def run(self, batch: GenerationBatch) -> list[Completion]:
        prompts = [{"prompt_token_ids": list(sample.request.prompt)} for sample in batch.samples]
        params = [self.params(**sampling_params(sample.request)) for sample in batch.samples]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        pairs = zip(batch.samples, outputs, strict=True)
        return [self._completion(sample.request, output.outputs[0]) for sample, output in pairs]

    def _completion(self, request: Request, output: Any) -> Completion:
        tokens = [int(token) for token in output.token_ids]
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
        return Completion(
            tokens=tokens,
            text=self.tokenizer.decode(tokens),
            logprobs=logprobs,
            raw_logprobs=logprobs if request.sampling.temperature in (0.0, 1.0) else [UNKNOWN] * len(tokens),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            prompt_tokens=len(request.prompt),
        )


def sampling_params(request: Request) -> dict[str, Any]:
    """A request as arguments of vLLM's SamplingParams; UserError for an unsupported one."""
    if request.stop_strings:
        raise UserError(
            'rollout.engine = "vllm" ends answers at token ids only; leave stop strings to "ray" or "local"'
        )
    sampling = request.sampling
    return dict(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=request.key & KEY_BITS,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def hub_state(state: Mapping[str, Tensor], cfg: ModelConfig | None) -> dict[str, Tensor]:
    """Weights under the names they have on disk, MTP modules left out; cfg None: a model of another family."""
    if cfg is None:
        return {name.removeprefix("inner."): tensor.contiguous() for name, tensor in state.items()}
    main = [slot for slot in slots(cfg) if not slot.copy and not slot.name.startswith("mtp.")]
    return {slot.key: slot.of(dict(state)).contiguous() for slot in main}
