"""The settings of the samplers "ray", "vllm" and "vllm-server": further keys of a stage's [rollout]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bessemer.config.rl import RLConfig
from bessemer.config.table import ConfigTable, validate


class RaySettings(ConfigTable):
    workers: int = Field(1, ge=1)
    """Number of separate rollout workers. Each holds the whole model, on one core or on `gpus` GPUs. Workers in excess
    of a rollout's batches are idle."""
    gpus: int | None = Field(None, ge=0)
    """GPUs per worker. Default: 1 if Ray has any. vLLM spreads one copy of the model over several. A Ray cluster that
    the run starts gets the GPUs that the trainer does not use. One of your own does not know which these are, so start
    it with them alone (CUDA_VISIBLE_DEVICES=1,2,3 ray start --head, RAY_ADDRESS=auto)."""

    @property
    def shares_gpus(self) -> bool:
        """Workers take turns with the trainer on its GPUs."""
        return False


class VLLMSettings(RaySettings):
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for a worker's weights, cache and workspace together."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum tokens of prompt and answer. Default: the model's context. Less leaves room for more samples."""
    sleep: bool | Literal[1, 2] = False
    """Release the GPU's memory between batches and share GPUs with the trainer, which needs memory too: lower
    gpu_memory_utilization. 1 or true: the weights wait in the node's memory; 2: they are dropped, and the trainer's are
    handed over again before the next batch. Without it, vLLM has GPUs of its own."""

    @property
    def shares_gpus(self) -> bool:
        return bool(self.sleep)

    @property
    def sleep_level(self) -> int:
        return int(self.sleep)


class VLLMOptions(VLLMSettings):
    """How a worker's engine is made: the user's settings, and what the stage needs of it."""

    records_routing: bool = False
    """Samples come with their experts."""
    records_kept: bool = False
    """Samples come with the tokens that truncation left."""
    lora_rank: int = 0
    """Rank of the adapters that are exchanged; 0: whole models are."""


DEFAULTS = VLLMOptions()


class ServerSettings(ConfigTable):
    url: str
    """Address of a `vllm serve` that runs already, such as http://127.0.0.1:8000. One that follows updates needs
    VLLM_SERVER_DEV_MODE=1 in its environment, and --logprobs-mode processed_logprobs for temperatures other than 1."""


def settings_of(stage: RLConfig) -> RaySettings:
    """The settings of a stage whose sampler is one of the two. UserError if they are others."""
    form: type[RaySettings] = VLLMSettings if stage.rollout.engine == "vllm" else RaySettings
    return validate(form, stage.rollout.settings, f'stage "{stage.name}"', ": rollout")
