"""The tables of a model that judges where no rule can: [stage.judge] of the stages reject and reward-model, and `judge`
of the reward "rubric" (rubric.py)."""

import re
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from bessemer.config.table import ConfigTable, StageRef
from bessemer.config.units import Seconds, Tokens


class AnyJudgeConfig(ConfigTable):
    """What all have; `local` is the key that names a model on this machine instead of an API."""

    runtime_only: ClassVar = frozenset({"api_key_env", "concurrency", "timeout", "retries"})
    local: ClassVar[str]

    url: str | None = None
    """An OpenAI-compatible API, such as "http://127.0.0.1:8000/v1" (bessemer serve, vLLM, a
    provider)."""
    served_model: str | None = None
    """Name of the model at `url`."""
    api_key_env: str | None = None
    """Environment variable that holds the API key. The key is stored nowhere, but it is sent in clear text: use https,
    except on this machine."""
    samples: int = Field(4, ge=1)
    """Judgements of each answer, by majority, or of each pair, half of them in each order (R1: 4 of each pair, in
    random order)."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Sampling temperature (undocumented)."""
    max_new_tokens: Tokens = Field(1024, ge=1)
    """Length cap of a judgement."""
    concurrency: int = Field(8, ge=1, le=256)
    """Concurrent requests to `url`."""
    timeout: Seconds = 300.0
    """Maximum time of a request."""
    retries: int = Field(8, ge=0)
    """Retries of a request that fails or is answered with 429 or 5xx; pauses grow to a minute."""

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError('give the base of an API, such as "https://api.example.com/v1"')
        if parts.username is not None:
            raise ValueError("a recipe must hold no credentials; name the variable of the key in api_key_env")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("give the name of an environment variable, such as JUDGE_KEY")
        return name

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (getattr(self, self.local) is None) == (self.url is None):
            raise ValueError(f"give either {self.local} or url")
        if (self.url is None) != (self.served_model is None):
            raise ValueError("url and served_model belong together")
        if self.url is None and self.api_key_env is not None:
            raise ValueError("api_key_env has no effect without url")
        return self


class JudgeConfig(AnyJudgeConfig):
    local: ClassVar = "stage"

    stage: StageRef | None = None
    """Instead of `url`: an earlier stage whose model judges. For a model directory, name a stage of kind import."""
