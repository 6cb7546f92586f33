"""Expert loads recorded by the engine, and the placement of a model's experts on a cluster by those loads.

`ExpertLoads` is a moving average of tokens per expert and window; a window is the traffic of some period, such as one
call of `Engine.generate`. The newest window has the largest weight, and a busy window weighs more than an idle one.

As in a deployment, `report` places experts by past traffic and evaluates the placement on what follows: the prompts are
divided into windows, the moving average over all but the last one gives the placement, the last one evaluates it. Only
the loads are real; the GPUs need not exist. The results are means over a window: a single batch is less balanced.

Shapes: T tokens fed, L sparse layers, K experts per token, E experts, G GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer import tasks
from bessemer.addons.distributed import eplb
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine, load_engine
from bessemer.engine.generation import Prompt
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

FORMAT = "bessemer expert loads"


def report(
    model_dir: str | Path,
    *,
    replicas: int,
    gpus: int,
    nodes: int = 1,
    groups: int | None = None,
    prompts: Sequence[Prompt] = (),
    names: Sequence[str] = (),
    problems: int = 32,
    windows: int = 4,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    loads_file: str | Path | None = None,
) -> dict[str, Any]:
    """Generates, places the experts and evaluates the placement; returns plain JSON.

    Traffic: `prompts` as for `Engine.generate`, and the first training `problems` of each task in `names`.
    groups: None uses the model's. loads_file: stores the moving average between calls; read if it exists, and written
    afterwards with all windows of this call, including the last.

    `layers` contains for each sparse layer: busiest GPU / mean GPU on the last window for the experts in order, one
    slot each ("naive"), and as placed ("placed"), the latter also on the loads used for the placement ("fitted"); those
    loads and the replicas of each expert ("load", "count"); the experts of each GPU ("gpus").
    """
    chosen = [tasks.get(name) for name in names]  # before loading: a misspelt name should fail at once
    engine = load_engine(model_dir)
    cfg = _sparse(engine, model_dir)
    groups = cfg.n_expert_groups if groups is None else groups
    sizes = (replicas, groups, nodes, gpus)
    loads = _loads(cfg, loads_file)
    eplb.place(np.ones(loads.shape), *sizes)  # checks the sizes before anything is generated
    traffic = [*prompts, *_questions(engine, chosen, problems)]
    *earlier, last = _windows(traffic, windows, has_estimate=loads.windows > 0)

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "record_routing": True}
    for window in earlier:
        loads.add(_routing(engine, window, sampling))
    load_LE, counted = loads.estimate(), (loads.windows, loads.tokens)
    placement = eplb.place(load_LE, *sizes)
    newest = ExpertLoads(*loads.shape)
    records = _routing(engine, last, sampling)
    newest.add(records)
    if loads_file is not None:
        loads.add(records)
        loads.save(loads_file)

    return {
        "model": str(model_dir),
        "experts": cfg.n_routed_experts,
        "replicas": replicas,
        "groups": groups,
        "nodes": nodes,
        "gpus": gpus,
        "policy": placement.policy,
        "windows": counted[0],
        "tokens": counted[1],
        "decay": loads.decay,
        "judged_on_tokens": newest.tokens,
        "layers": _layers(cfg.n_dense_layers, placement, load_LE, newest.estimate(), gpus),
    }


def describe(facts: dict[str, Any]) -> str:
    """The report as text: the sizes, the balance of every layer, then its GPUs with their experts."""
    slots, spare = facts["replicas"] // facts["gpus"], facts["replicas"] - facts["experts"]
    layers = facts["layers"]
    lines = [
        f"{facts['experts']} experts in {facts['replicas']} slots ({spare} spare): {facts['gpus']} GPUs of {slots}, "
        f"{facts['nodes']} {_plural('node', facts['nodes'])}",
        _policy(facts),
        f"placed by {facts['tokens']:,} tokens (moving average of {facts['windows']} "
        f"{_plural('window', facts['windows'])}), judged on the {facts['judged_on_tokens']:,} tokens that came next",
        "",
        "busiest GPU / mean GPU; 1 is best",
        "layer   in order, one each   placed   placed, on the loads it was made from",
    ]
    rows = [(str(layer["layer"]), *(layer[key] for key in ("naive", "placed", "fitted"))) for layer in layers]
    rows.append(("mean", *(float(np.mean([row[n] for row in rows])) for n in (1, 2, 3))))
    lines += [f"{name:>5}   {naive:18.3f}   {placed:6.3f}   {fitted:6.3f}" for name, naive, placed, fitted in rows]
    lines += ["", "experts of each GPU (| next GPU, || next node)"]
    return "\n".join([*lines, *(f"layer {layer['layer']}: {_slots(layer['gpus'], facts)}" for layer in layers)])


def _policy(facts: dict[str, Any]) -> str:
    nodes, groups = facts["nodes"], facts["groups"]
    if facts["policy"] == "global":
        return f"global placement: {nodes} nodes do not divide {groups} expert groups, so any expert may go anywhere"
    if nodes == 1:
        return "one node: any expert may go to any GPU"
    share = groups // nodes
    return f"hierarchical placement: {share} of {groups} expert {_plural('group', groups)} whole on each node"


def _slots(expert_GS: list[list[int]], facts: dict[str, Any]) -> str:
    gpus = [" ".join(map(str, expert_S)) for expert_S in expert_GS]
    per_node = len(gpus) // facts["nodes"]
    return " || ".join(" | ".join(gpus[first : first + per_node]) for first in range(0, len(gpus), per_node))


def _plural(word: str, n: int) -> str:
    return word if n == 1 else word + "s"


def _layers(
    first: int, placement: eplb.Placement, load_LE: np.ndarray, newest_LE: np.ndarray, gpus: int
) -> list[dict[str, Any]]:
    naive_L = eplb.naive_balance(newest_LE, gpus)
    placed_L = eplb.balance(placement, newest_LE, gpus)
    fitted_L = eplb.balance(placement, load_LE, gpus)
    expert_LGS = placement.replica_to_expert_LR.reshape(len(load_LE), gpus, -1)
    return [
        {
            "layer": first + n,
            "naive": float(naive_L[n]),
            "placed": float(placed_L[n]),
            "fitted": float(fitted_L[n]),
            "load": load_LE[n].tolist(),
            "count": placement.count_LE[n].tolist(),
            "gpus": expert_LGS[n].tolist(),
        }
        for n in range(len(load_LE))
    ]


def _sparse(engine: Engine, model_dir: str | Path) -> ModelConfig:
    cfg = engine.model.cfg
    if not isinstance(cfg, ModelConfig) or cfg.n_dense_layers == cfg.n_layers:
        raise UserError(
            f"{model_dir}: no layer of this model has routed experts that we know; there is nothing to place"
        )
    return cfg


def _loads(cfg: ModelConfig, path: str | Path | None) -> ExpertLoads:
    shape = (cfg.n_layers - cfg.n_dense_layers, cfg.n_routed_experts)
    if path is None:
        return ExpertLoads(*shape)
    if not Path(path).exists():
        if not Path(path).parent.is_dir():  # fail before the work, not after it
            raise UserError(f"{path}: its folder does not exist; create it, or choose another file")
        return ExpertLoads(*shape)
    loads = ExpertLoads.load(path)
    if loads.shape != shape:
        raise UserError(
            f"{path} has loads of {loads.shape[0]} layers and {loads.shape[1]} experts, but the model {shape[0]} and "
            f"{shape[1]}; give this model's file, or another name"
        )
    return loads


def _questions(engine: Engine, chosen: Sequence[tasks.Task], problems: int) -> list[list[int]]:
    numbers = [(task, n) for task in chosen for n in range(min(problems, task.size("train") or problems))]
    return [question_ids(engine.tokenizer, task.problem("train", n).prompt) for task, n in numbers]


def _windows(traffic: Sequence[Prompt], windows: int, has_estimate: bool) -> list[Sequence[Prompt]]:
    """Each window takes every n-th prompt, so that it contains every task. With loads from an earlier call, one window
    is enough."""
    least = 1 if has_estimate else 2
    if windows < least:
        raise UserError(f"windows must be at least {least}, not {windows}: the last one evaluates the placement")
    if len(traffic) < windows:
        raise UserError(
            f"{len(traffic)} prompts do not fill {windows} windows; give more prompts or problems, or fewer windows"
        )
    return [traffic[first::windows] for first in range(windows)]


def _routing(engine: Engine, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list:
    return [completion.routing for (completion,) in engine.generate(prompts, **sampling)]


class ExpertLoads:
    """Moving average of each expert's tokens per window, in each layer."""

    def __init__(self, n_layers: int, n_experts: int, decay: float = 0.9):
        """`decay`: a window's weight relative to the next one; 0 uses the last window only, 1 is the plain mean."""
        if not 0 <= decay <= 1:
            raise UserError(f"decay must lie between 0 and 1, not {decay}")
        self.decay = float(decay)
        self.windows = 0
        """Number of windows; those without tokens are not counted."""
        self.tokens = 0
        """Number of tokens in them."""
        self._mean_LE = np.zeros((n_layers, n_experts))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self._mean_LE.shape

    def add(self, routing: Tensor | Iterable[Tensor]) -> None:
        """Adds a window: `Completion.routing`, [T, L, K], of one sample or of all its samples.

        A prompt counts once for every sample that continues it, as if each were a separate request.
        """
        records = [routing] if routing is None or isinstance(routing, Tensor) else list(routing)
        window_LE = sum((expert_counts(record, *self.shape) for record in records), np.zeros(self.shape))
        tokens = sum(len(record) for record in records)
        if not tokens:
            return
        self.windows, self.tokens = self.windows + 1, self.tokens + tokens
        # the total weight of all windows, 1 + decay + decay^2 ..., so that the estimate is not biased towards zero
        weight = self.windows if self.decay == 1 else (1 - self.decay**self.windows) / (1 - self.decay)
        self._mean_LE += (window_LE - self._mean_LE) / weight

    def estimate(self) -> NDArray[np.float64]:
        """Tokens per window of each expert, [L, E]. UserError before the first window."""
        if not self.windows:
            raise UserError("no routing has been added yet, so the loads are unknown; generate with record_routing")
        return self._mean_LE.copy()

    def save(self, path: str | Path) -> None:
        """Writes JSON atomically."""
        path = Path(path)
        facts = {
            "format": FORMAT,
            "decay": self.decay,
            "windows": self.windows,
            "tokens": self.tokens,
            "load": self._mean_LE.tolist(),
        }
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(facts) + "\n", "utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}; choose a file in a folder you may write") from None

    @classmethod
    def load(cls, path: str | Path) -> ExpertLoads:
        """Reads a file written by `save`; the result is bitwise equal to the saved object."""
        try:
            facts = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give a file that ExpertLoads.save wrote") from None
        except ValueError:
            raise UserError(f"{path} is not JSON; give a file that ExpertLoads.save wrote") from None
        mean_LE = _checked(facts, path)
        n_layers, n_experts = mean_LE.shape
        loads = cls(n_layers, n_experts, facts["decay"])
        loads.windows, loads.tokens, loads._mean_LE = facts["windows"], facts["tokens"], mean_LE
        return loads


def expert_counts(routing: Tensor, n_layers: int, n_experts: int) -> NDArray[np.int64]:
    """How many of T tokens chose each expert, [L, E], from a record [T, L, K]."""
    if routing is None:
        raise UserError("this completion has no record of its routing; generate with record_routing=True")
    if routing.ndim != 3 or routing.shape[1] != n_layers or routing.is_floating_point():
        raise UserError(
            f"a routing record has whole numbers [tokens, {n_layers} layers, experts per token], but this one is "
            f"{str(routing.dtype).removeprefix('torch.')} {list(routing.shape)}; add one of an engine with the same "
            "model"
        )
    expert_TLK = routing.long()
    if expert_TLK.numel() and not 0 <= expert_TLK.min() <= expert_TLK.max() < n_experts:
        raise UserError(
            f"a routing record names experts {int(expert_TLK.min())} to {int(expert_TLK.max())}, but the model has "
            f"{n_experts}; add one of an engine with the same model"
        )
    cell_TLK = expert_TLK + n_experts * torch.arange(n_layers, device=routing.device)[:, None]
    count = torch.bincount(cell_TLK.flatten(), minlength=n_layers * n_experts)
    return count.view(n_layers, n_experts).cpu().numpy()


def _checked(facts: object, path: str | Path) -> NDArray[np.float64]:
    """Validates the contents of a file and returns its table [L, E]."""

    def wrong(fault: str) -> UserError:
        return UserError(f"{path}: {fault}; record the loads again")

    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise wrong(f'not a file of expert loads ("format" is not "{FORMAT}")')
    decay = facts.get("decay")
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise wrong(f'"decay" is {decay!r}, not a number between 0 and 1')
    for key in ("windows", "tokens"):
        if type(facts.get(key)) is not int or facts[key] < 0:
            raise wrong(f'"{key}" is {facts.get(key)!r}, not a whole number of at least 0')
    try:
        mean_LE = np.array(facts.get("load"), dtype=np.float64)
    except (TypeError, ValueError):
        mean_LE = np.empty(0)
    if mean_LE.ndim != 2 or not mean_LE.size or not np.isfinite(mean_LE).all() or (mean_LE < 0).any():
        raise wrong('"load" is not a table [layers, experts] of counts, 0 or more')
    return mean_LE
