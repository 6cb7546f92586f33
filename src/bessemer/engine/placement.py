"""Where the experts of a model would go on a cluster, by loads that the engine records, and what that is worth.

As in a deployment, experts are placed by the traffic seen so far and judged on what comes next: the prompts are cut
into windows, the moving average over all but the last one places, the last one judges. Only loads are real here; the
GPUs need not exist. The figures are means over a window: a single batch is less even than that.

Shapes: L sparse layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bessemer import tasks
from bessemer.data.chat import question_ids
from bessemer.engine import eplb
from bessemer.engine.engine import Engine, Prompt
from bessemer.engine.expert_loads import Loads
from bessemer.engine.generate import load_engine
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig


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
    """Generates, places and judges; plain JSON.

    Traffic: `prompts` as `Engine.generate` takes them, and of each task in `names` its first training `problems`.
    groups: None is the model's own. loads_file: where the moving average is kept from one call to the next; read if it
    is there, written afterwards with all windows of this call, the last one too.

    Beside the sizes, `layers` has of each sparse layer: busiest GPU / mean GPU on the last window for the experts in
    order, one each ("naive") and as placed ("placed"), the latter also on the loads it was made from ("fitted"); those
    loads and the replicas of each expert ("load", "count"); the experts of each GPU ("gpus").
    """
    chosen = [tasks.get(name) for name in names]  # before loading: a misspelt name should not cost a minute
    engine = load_engine(model_dir)
    cfg = _sparse(engine, model_dir)
    groups = cfg.n_expert_groups if groups is None else groups
    sizes = (replicas, groups, nodes, gpus)
    loads = _loads(cfg, loads_file)
    eplb.place(np.ones(loads.shape), *sizes)  # refuses what cannot be served before anything is generated
    traffic = [*prompts, *_questions(engine, chosen, problems)]
    *seen, last = _windows(traffic, windows, known=loads.windows > 0)

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "record_routing": True}
    for window in seen:
        loads.add(_routing(engine, window, sampling))
    load_LE, before = loads.estimate(), (loads.windows, loads.tokens)
    placement = eplb.place(load_LE, *sizes)
    newest = Loads(*loads.shape)
    records = _routing(engine, last, sampling)
    newest.add(records)
    if loads_file is not None:
        loads.add(records)
        loads.save(loads_file)

    facts = {"model": str(model_dir), "experts": cfg.n_routed_experts, "replicas": replicas, "groups": groups,
             "nodes": nodes, "gpus": gpus, "policy": placement.policy, "windows": before[0], "tokens": before[1],
             "decay": loads.decay, "judged_on_tokens": newest.tokens}  # fmt: skip
    return facts | {"layers": _layers(cfg.n_dense_layers, placement, load_LE, newest.estimate(), gpus)}


def describe(facts: dict[str, Any]) -> str:
    """For a person: the sizes, the balance of every layer, then its GPUs with their experts."""
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
    held = groups // nodes
    return f"hierarchical placement: {held} of {groups} expert {_plural('group', groups)} on each node, all of it there"


def _slots(expert_GS: list[list[int]], facts: dict[str, Any]) -> str:
    gpus = [" ".join(map(str, expert_S)) for expert_S in expert_GS]
    each = len(gpus) // facts["nodes"]
    return " || ".join(" | ".join(gpus[first : first + each]) for first in range(0, len(gpus), each))


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
        {"layer": first + n, "naive": float(naive_L[n]), "placed": float(placed_L[n]), "fitted": float(fitted_L[n]),
         "load": load_LE[n].tolist(), "count": placement.count_LE[n].tolist(), "gpus": expert_LGS[n].tolist()}
        for n in range(len(load_LE))
    ]  # fmt: skip


def _sparse(engine: Engine, model_dir: str | Path) -> ModelConfig:
    cfg = engine.model.cfg
    if not isinstance(cfg, ModelConfig) or cfg.n_dense_layers == cfg.n_layers:
        raise UserError(
            f"{model_dir}: no layer of this model has routed experts that we know, so there is nothing to place"
        )
    return cfg


def _loads(cfg: ModelConfig, path: str | Path | None) -> Loads:
    shape = (cfg.n_layers - cfg.n_dense_layers, cfg.n_routed_experts)
    if path is None:
        return Loads(*shape)
    if not Path(path).exists():
        if not Path(path).parent.is_dir():  # said now, not after the work
            raise UserError(f"{path}: its folder does not exist; make it, or choose another file")
        return Loads(*shape)
    loads = Loads.load(path)
    if loads.shape != shape:
        raise UserError(
            f"{path} has loads of {loads.shape[0]} layers and {loads.shape[1]} experts, the model has {shape[0]} and "
            f"{shape[1]}; give the file of this model, or another name"
        )
    return loads


def _questions(engine: Engine, chosen: Sequence[tasks.Task], problems: int) -> list[list[int]]:
    numbers = [(task, n) for task in chosen for n in range(min(problems, task.size("train") or problems))]
    return [question_ids(engine.tokenizer, task.problem("train", n).prompt) for task, n in numbers]


def _windows(traffic: Sequence[Prompt], windows: int, known: bool) -> list[Sequence[Prompt]]:
    """Every n-th prompt, so that each window has something of every task. Loads known before need no first window."""
    least = 1 if known else 2
    if windows < least:
        raise UserError(f"windows must be at least {least}, is {windows}: the last one judges what the others placed")
    if len(traffic) < windows:
        raise UserError(
            f"{len(traffic)} prompts do not fill {windows} windows; give more prompts or problems, or fewer windows"
        )
    return [traffic[first::windows] for first in range(windows)]


def _routing(engine: Engine, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list:
    return [completion.routing for (completion,) in engine.generate(prompts, **sampling)]
