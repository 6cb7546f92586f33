"""An existing `vllm serve` as an engine: completions of token ids over its OpenAI-compatible API.

    POST /v1/completions        the prompt as token ids; return_token_ids, logprobs and prompt_logprobs bring numbers
    GET  /version, /v1/models   what is asked before the first sample
    GET  /server_info           its device, and whether it takes new weights: only with VLLM_SERVER_DEV_MODE=1
    POST /collective_rpc        reload_weights from a checkpoint that the trainer writes, and /reset_prefix_cache

A request holds one sample, since each has a seed of its own; the server batches what is under way and finds equal
prompts in its prefix cache. A sample is a function of its key and the weights up to rounding, which follows the batches
that the server happens to make: where two tokens are nearly equal, a repeated sample may go another way. Nothing from
the server is trusted: a reply has a size, and a field that is missing or of another type is a UserError with its name.

Run with vLLM 0.32 on CPUs, whose `reload_weights` leaves a model that is neither the old nor the new one. A server on a
CPU therefore samples fixed weights alone.
"""

from __future__ import annotations

import ipaddress
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from bessemer.addons.distributed.json_server import JSONServer, Refused, checked_url
from bessemer.addons.distributed.sampler_check import BOUNDS
from bessemer.addons.distributed.vllm_engine import KEY_BITS, check_length, hub_state
from bessemer.addons.distributed.vllm_weights import FILE, WeightFile
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Completion, GenerationBatch
from bessemer.engine.sequence import Request, cut_at_stop
from bessemer.errors import UserError
from bessemer.hf.model_directory import own_config

KEY = "VLLM_API_KEY"
"""The environment variable with the server's key, if it asks for one; vLLM reads the same."""
VERSIONS = ((0, 32), (0, 33))
"""The oldest and the newest release whose fields are known."""
AT_ONCE = 256
"""Requests under way; vLLM's own default batch."""


class VLLMServer:
    """A server at `url`. `directory`: the model that it should have, and its `tokenizer`. `open` comes first."""

    def __init__(self, url: str, directory: Path, tokenizer: Tokenizer) -> None:
        self.url = checked_url(url, "rollout.url")
        resumes = "the same command goes on from the last checkpoint"
        self.http = JSONServer(self.url, "the vLLM server", KEY, resumes)
        self.directory, self.tokenizer = directory, tokenizer
        self.cfg = own_config(directory)
        self.dtype = "bfloat16"
        """In which the server computes, unless it says otherwise."""
        self.max_model_len: int | None = None
        self.model = ""
        """The name under which the server has its model."""
        self._file: WeightFile | None = None

    def open(self, trains: bool = False) -> str | None:
        """Asks for the version and the model; returns a warning. UserError if it is no server that this module can
        use, or with `trains` if it takes no new weights."""
        reply = self.http.call("/version")
        version = reply.get("version") if isinstance(reply, dict) else None
        warning = check_version(version, self.url)
        entries = self.http.models()
        base = [entry for entry in entries if not entry.get("parent")] or entries
        self.model = base[0]["id"]
        longest = base[0].get("max_model_len")
        self.max_model_len = longest if isinstance(longest, int) else None
        self._read_info(trains)
        return warning

    def _read_info(self, trains: bool) -> None:
        """Reads in what the server computes, if it says so. UserError if it must follow updates and cannot."""
        try:
            info = self.http.call("/server_info?config_format=json")
        except Refused as error:
            if error.status != 404:
                raise
            if trains:
                raise UserError(
                    f"the vLLM server at {self.url} takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 in its "
                    "environment, where nobody else reaches its port"
                ) from None
            return
        config = info.get("vllm_config") if isinstance(info, dict) else None
        config = config if isinstance(config, dict) else {}
        model = config.get("model_config")
        dtype = str(model.get("dtype") if isinstance(model, dict) else "").removeprefix("torch.")
        self.dtype = dtype if dtype in BOUNDS else self.dtype
        if trains and "cpu" in str(config.get("device_config")).lower():
            raise UserError(
                f"the vLLM server at {self.url} runs on a CPU and cannot take new weights in place; sample RL with "
                'rollout.engine = "vllm", whose worker starts anew after each update, or use this server for stages '
                "whose weights stay, such as reject and eval"
            )

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of every id after the first."""
        choice = self._complete({"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})
        steps = choice.get("prompt_logprobs")
        if not isinstance(steps, list) or len(steps) != len(ids):
            raise self._unusable("its replies have no prompt_logprobs")
        try:
            return [float(step[str(token)]["logprob"]) for step, token in zip(steps[1:], ids[1:], strict=True)]
        except (LookupError, TypeError, ValueError):
            raise self._unusable("its prompt_logprobs are not those of the prompt") from None

    def run(self, batch: GenerationBatch) -> list[Completion]:
        check_length(batch, self.max_model_len)
        with ThreadPoolExecutor(min(AT_ONCE, len(batch.samples))) as pool:
            return list(pool.map(self.sample, (sample.request for sample in batch.samples)))

    def sample(self, request: Request) -> Completion:
        choice = self._complete(body_of(request))
        tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise self._unusable("its replies have no token_ids")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(values, list) or len(values) != len(tokens) or None in values:
            raise self._unusable("its replies have no logprobs of their tokens")
        text = cut_at_stop(self.tokenizer.decode(tokens), request.stop_strings)
        return Completion(
            tokens=array("i", tokens),
            text=text,
            logprobs=array("f", map(float, values)),
            finish_reason="stop" if choice.get("finish_reason") == "stop" else "length",
            prompt_tokens=len(request.prompt),
        )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """New weights, through a checkpoint that both sides see: in shared memory if the server is on this machine,
        else beside the run."""
        if self._file is None:
            config = self.directory / "config.json"
            self._file = WeightFile(config) if self.is_local() else WeightFile(config, self.directory.parent)
        with self._file.holding(hub_state(weights, self.cfg, self.directory)) as folder:
            self.http.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        assert not (self._file.folder / FILE).exists()
        self.http.call("/reset_prefix_cache", {})

    def is_local(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.http.call("/v1/completions", {"model": self.model, "return_token_ids": True, "logprobs": 0} | body)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._unusable("its reply is not a completion")
        return choices[0]

    def _unusable(self, why: str) -> UserError:
        low, high = ("{}.{}".format(*version) for version in VERSIONS)
        return UserError(f"the server at {self.url} cannot sample: {why}; start a `vllm serve` of {low} to {high}")


def check_version(version: object, url: str) -> str | None:
    """A warning for a release newer than those known; UserError for an older one, or for no vLLM."""
    numbers = version.split(".")[:2] if isinstance(version, str) else []
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"the server at {url} is no vLLM server: /version states none")
    release, (low, high) = (int(numbers[0]), int(numbers[1])), VERSIONS
    if release < low:
        raise UserError(
            f"the vLLM server at {url} has version {version}, which lacks fields that are read; install "
            f"{low[0]}.{low[1]} or newer"
        )
    if release > high:
        return (
            f"warning: the vLLM server at {url} has version {version}, newer than {high[0]}.{high[1]}, the last known"
        )
    return None


def body_of(request: Request) -> dict[str, Any]:
    """A request as the body of /v1/completions."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": request.key & KEY_BITS,
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
    }
    if request.stop_strings:
        body["stop"] = list(request.stop_strings)
    return body
