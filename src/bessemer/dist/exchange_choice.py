"""Which backend exchanges a run's tokens: what the recipe names, or the fastest that every rank can use."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Literal

import torch

from bessemer.dist import deepep
from bessemer.dist.mesh import Layout
from bessemer.dist.ranks import Ranks
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

Wanted = Literal["auto", "all-to-all", "deepep"]


def choose(
    wanted: Wanted, layout: Layout, cfg: ModelConfig, ranks: Ranks, say: Callable[[str], None]
) -> Literal["all-to-all", "deepep"]:
    """Says which and why. UserError on all ranks if one of them cannot use what the recipe names. Collective."""
    if layout.ep == 1:
        return "all-to-all"
    if wanted == "all-to-all" or (wanted == "auto" and ranks.device.type != "cuda"):
        if ranks.device.type == "cuda":
            say("exchange of tokens: all-to-all, as [layout] exchange says")
        return "all-to-all"
    unfit = unfit_for_deepep(layout, cfg, ranks.device)
    faults = ranks.all_gather((unfit, platform.node()), "the choice of an exchange")
    why = next((f"rank {rank} on {host}: {text}" for rank, (text, host) in enumerate(faults) if text), "")
    if why and wanted == "deepep":
        raise _refusal(why)
    say(f"exchange of tokens: all-to-all; not DeepEP: {why}" if why else "exchange of tokens: DeepEP")
    return "all-to-all" if why else "deepep"


def check(wanted: Wanted, layout: Layout, cfg: ModelConfig, here: bool) -> None:
    """UserError, before anything runs, for what the recipe names and the layout or the model does not allow; `here`:
    or this machine."""
    if wanted == "deepep" and layout.ep > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if why := unfit_for_deepep(layout, cfg, device) if here else unfit_layout(layout, cfg):
            raise _refusal(why)


def _refusal(why: str) -> UserError:
    mend = "install its wheel on all ranks, or " if "not installed" in why else ""
    return UserError(f'[layout] exchange = "deepep": {why}; {mend}set exchange = "auto"')


def unfit_for_deepep(layout: Layout, cfg: ModelConfig, device: torch.device) -> str:
    """Why this rank cannot use it; empty if it can."""
    if device.type != "cuda":
        return "it needs GPUs"
    return unfit_layout(layout, cfg) or deepep.absent() or deepep.unfit_card(device)


def unfit_layout(layout: Layout, cfg: ModelConfig) -> str:
    """The same of a layout and a model, whatever the machine."""
    return deepep.unfit_shape(layout.ep, layout.node, cfg.dim, cfg.n_activated_experts, cfg.n_routed_experts)


def present() -> dict[str, str]:
    """Backends of this machine: why each is not there, or nothing."""
    return {
        "deepep": deepep.absent() or ("" if torch.cuda.is_available() else "it needs GPUs"),
        "all-to-all": "",
    }
