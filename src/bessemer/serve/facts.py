"""What /v1/models says about a model, read from its directory without loading it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bessemer.data import chat
from bessemer.data.special import THINK, THINK_END
from bessemer.data.tokenizer import read_json
from bessemer.hf import hub
from bessemer.hf.causal_lm import LIMITS, is_foreign
from bessemer.hf.reader import Checkpoint
from bessemer.model import counts

GENERATION = {"temperature": (int, float), "top_p": (int, float), "top_k": int, "min_p": (int, float),
              "repetition_penalty": (int, float)}  # fmt: skip
"""Keys of generation_config.json that are heeded, and what they may be."""


@dataclass(frozen=True)
class Facts:
    """One model that the server offers."""

    name: str
    """What requests call it."""
    folder: Path
    """Its Hugging Face directory."""
    created: int
    """Unix time of its config.json."""
    architecture: str
    parameters: int
    active_parameters: int | None
    """What one token uses; None where only transformers knows."""
    context: int
    """Tokens of prompt and answer together."""
    thinks: bool
    """Its vocabulary has <think> and </think>."""
    style: Literal["r1", "zero", "own"] | None
    """Its chat template: one of ours, one of its own, or none."""
    layers: int
    sparse_layers: int = 0
    """Layers whose routing can be reported."""
    experts: int = 0
    experts_per_token: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    """What its generation_config.json advises."""
    end_ids: tuple[int, ...] = ()
    """Ends of an answer that generation_config.json names."""


def read(name: str, folder: Path) -> Facts:
    """UserError where something is missing or broken."""
    common: dict[str, Any] = dict(
        name=name, folder=folder, created=int((folder / "config.json").stat().st_mtime), **_tokenizer(folder),
        **_generation(folder),
    )  # fmt: skip
    if is_foreign(folder):
        config = read_json(folder / "config.json")
        config |= config.get("text_config") or {}
        limits = [config.get(key) for key in (*LIMITS, "n_positions")]
        shapes = {key: entry.shape for key, entry in Checkpoint(folder).entries.items()}
        return Facts(
            architecture=str(config.get("model_type")), parameters=sum(map(math.prod, shapes.values())),
            active_parameters=None, context=min((limit for limit in limits if limit), default=0),
            layers=int(config.get("num_hidden_layers") or config.get("n_layer") or 0), **common,
        )  # fmt: skip
    cfg = hub.read_config(folder)
    sparse = cfg.n_layers - cfg.n_dense_layers
    return Facts(
        architecture=str(read_json(folder / "config.json").get("model_type")), parameters=counts.main_params(cfg),
        active_parameters=counts.active_params(cfg), context=cfg.max_seq_len, layers=cfg.n_layers, sparse_layers=sparse,
        experts=cfg.n_routed_experts if sparse else 0, experts_per_token=cfg.n_activated_experts if sparse else 0,
        **common,
    )  # fmt: skip


def _tokenizer(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json")
    added = {token.get("content") for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    path, named = folder / "chat_template.jinja", config.get("chat_template")
    template = path.read_text("utf-8") if path.is_file() else json.dumps(named) if isinstance(named, list) else named
    style = next((style for style in chat.STYLES if chat.jinja(style) == template), "own" if template else None)
    return {"thinks": {THINK, THINK_END} <= added, "style": style}


def _generation(folder: Path) -> dict[str, Any]:
    """Absent or broken, the file advises nothing."""
    try:
        advice = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(advice, dict):
        return {}
    given = {key: advice.get(key) for key in GENERATION if not isinstance(advice.get(key), bool)}
    sampling = {key: value for key, value in given.items() if isinstance(value, GENERATION[key])}
    if advice.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    ends = advice.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {"sampling": sampling, "end_ids": tuple(i for i in ends if isinstance(i, int) and i >= 0)}
