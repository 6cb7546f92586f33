"""vLLM as a side of `bessemer drift`: its own modules, hooked in this process, in the prefill of all ids at once.

Run with vLLM 0.32 on a CPU (tools/vllm_cpu.sh). vLLM carries the residual stream beside the hidden state and adds the
two in its norms, so the stream after a layer is their sum. It computes in eager mode: in a compiled graph there is no
module to hook.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bessemer.addons.distributed.ray_settings import VLLMOptions
from bessemer.addons.distributed.vllm_engine import CPU_ENVIRONMENT, MLA_OFF, llm_arguments, mla_off
from bessemer.addons.evals.drift_measure import LayerPart
from bessemer.addons.evals.drift_sides import (
    ATTENTION,
    FEED_FORWARD,
    PassWatch,
    PointProbe,
    Take,
    child,
    decoder_layers,
    points_of,
    routed_experts,
    second_reader,
    shows,
    watching,
)
from bessemer.errors import UserError


class VLLM:
    """One engine that holds the model of a directory."""

    def __init__(self, directory: Path, dtype: torch.dtype, n: int):
        """n: ids of the row."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if mla_off(config):
            os.environ.setdefault(MLA_OFF, "1")
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError:
            raise UserError("--between vllm needs vLLM: pip install 'bessemer[vllm]'") from None
        arguments = llm_arguments(int(not current_platform.is_cpu()), VLLMOptions(max_model_len=n + 1))
        arguments |= dict(
            dtype=str(dtype).removeprefix("torch."), enforce_eager=True, skip_tokenizer_init=True,
            enable_chunked_prefill=False, max_num_batched_tokens=max(2048, n + 1), enable_prefix_caching=False,
        )  # fmt: skip
        self.params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self.llm = LLM(model=str(directory), **arguments)
        (model,) = self.llm.apply_model(lambda model: model)
        self.body: Any = model.model
        text = config.get("text_config") or config
        self.sizes = text["vocab_size"], text["hidden_size"], text["num_hidden_layers"]
        self.longest = text["max_position_embeddings"]
        self.layers = decoder_layers(self.body, self.sizes[2])
        self.probes = [shows(LayerPart(-1, "embedding"), self.body.embed_tokens)]
        for i, layer in enumerate(self.layers):
            self.probes += [
                shows(LayerPart(i, "attention"), child(layer, ATTENTION)),
                shows(LayerPart(i, "MLP"), child(layer, FEED_FORWARD)),
                PointProbe(LayerPart(i, "residual stream"), layer, lambda _, output: output[0] + output[1]),
            ]
            norm = second_reader(layer)
            if norm is not None and norm is not child(layer, FEED_FORWARD):
                self.probes.append(PointProbe(LayerPart(i, "after attention"), norm, lambda _, output: output[1]))
        self.probes.append(shows(LayerPart(len(self.layers), "final norm"), self.body.norm))
        routers = ((i, self._router(layer)) for i, layer in enumerate(self.layers))
        self.routers = {i: router for i, router in routers if router is not None}
        routed = [LayerPart(i, "router") for i in self.routers]
        self.points = points_of(self.probes, len(self.layers)).union(routed)

    @staticmethod
    def _router(layer: Any) -> Any:
        """The object that chooses a layer's experts, if it can be listened to."""
        router = getattr(routed_experts(layer), "router", None)
        return router if hasattr(router, "set_capture_fn") else None

    def run(self, ids: Sequence[int], take: Take) -> None:
        span = PassWatch(take)
        span.end = len(ids)
        with self._watched(span):
            prompt: Any = {"prompt_token_ids": list(ids)}
            (output,) = self.llm.generate([prompt], self.params, use_tqdm=False)
        steps = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        logp_T = torch.tensor([step[token].logprob for step, token in steps])
        take(LayerPart(len(self.layers), "log-probs"), 1, logp_T[:, None])

    @contextmanager
    def _watched(self, span: PassWatch) -> Iterator[None]:
        for i, router in self.routers.items():
            router.set_capture_fn(partial(span.give, LayerPart(i, "router")))
        try:
            with watching(self.probes, span):
                yield
        finally:
            for router in self.routers.values():
                router.set_capture_fn(None)
