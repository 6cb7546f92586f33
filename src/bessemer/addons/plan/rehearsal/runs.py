"""Part 1 of a rehearsal, what was run: a miniature on ranks against one process; a slow, a hung and a killed rank."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.addons.distributed import schedules, watchdog
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.plan.rehearsal import collectives, rollouts
from bessemer.addons.plan.rehearsal.collectives import Counter, Wrap
from bessemer.addons.plan.rehearsal.miniature import FSDP, NODES, STEPS, Miniature, RankGroup, micro_batches
from bessemer.addons.plan.rehearsal.processes import Ended, on_ranks
from bessemer.addons.plan.rehearsal.training import Incident, trained
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError

LOSSES, GRADIENTS, LATER = 1e-5, 1e-4, 1e-3
"""Largest relative differences from one process: of a metric of the first step; of a parameter's gradient there,
|g - g0| / |g0|; of a metric of a later step. Float32 sums in another order give a tenth of the first two or less; a
lost, repeated or scaled part gives a thousand times as much. The first updates divide gradients by themselves, however
small, so afterwards a token between two experts that are nearly tied may go to the other one: that alone moves a metric
by some 1e-4. Weights that are not updated move it by 1e-2."""
NOTHING = 1e99
"""The difference from what is not there or not a number; JSON has no infinity."""
TINY = 1e-6
"""Gradients and metrics below this fraction of the largest, or this value, are compared with it instead: they are
rounding themselves."""
SLOW, HANG_LIMIT, HANG = 1.0, 15.0, 60.0
"""Seconds: of the delay that must change nothing; of the watchdog's limit in the run with a hung rank; of its sleep."""
END_LIMIT = 60.0
"""Seconds after a rank's death in which all others must have ended."""

ROLLOUT_METRICS = ("rl/reward", "rl/length", "rl/kl", "rl/entropy", "rl/clip_share", "rl/grad_norm")
ROLLOUTS_BOUND, SMALL = 1e-3, 1e-3
"""Of RL's metrics: the largest relative difference, and the value below which it is taken of that instead. One sample
that differed by a token would exceed it."""

Say = Callable[[str], None]


def run_all(
    networks: Sequence[Miniature], recipe: Recipe, say: Say, plant: Wrap | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """The facts of every network's groups; "faults" in them are reasons to refuse. `plant`: for a rehearsal that must
    be refused, it replaces collective operations on the ranks."""
    facts = []
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            facts.append(_of_network(network, recipe, Path(folder), say, plant))
    return facts


def _of_network(network: Miniature, recipe: Recipe, folder: Path, say: Say, plant: Wrap | None) -> dict[str, Any]:
    base = folder / "base" / "model"
    if not network.own:
        _write_other(network, base)
    groups = [_of_group(network, group, base, say, plant) for group in network.groups]
    facts: dict[str, Any] = {"network": describe(network), "groups": groups}
    facts["faults"] = [fault for group in groups for fault in group["faults"]]
    if network.groups and not facts["faults"]:
        facts["incidents"] = _incidents(network, network.groups[0], base, folder, say)
        facts["faults"] += facts["incidents"].pop("faults")
    if network.groups and network.rl is not None and not facts["faults"]:
        facts["rollouts"] = _rollouts(network, network.groups[0], recipe, folder / "base", say)
        facts["faults"] += facts["rollouts"].pop("faults")
    return facts


def describe(network: Miniature) -> str:
    if isinstance(network.small, dict):
        return f"{network.small['model_type']}, {network.small['num_hidden_layers']} layers of transformers"
    small = network.small
    mtp = f" and {small.n_mtp} MTP module" * (small.n_mtp > 0)
    return (
        f"{small.n_layers} layers of width {small.dim}{mtp}, {small.n_routed_experts} experts in "
        f"{small.n_expert_groups} groups, {small.n_activated_experts} per token"
    )


def _write_other(network: Miniature, base: Path) -> None:
    try:
        import transformers
    except ImportError:
        raise UserError("a model of another family needs transformers: pip install 'bessemer[hf]'") from None
    import torch

    assert isinstance(network.small, dict), "it is of another family"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(**network.small)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)


def _of_group(network: Miniature, group: RankGroup, base: Path, say: Say, plant: Wrap | None) -> dict[str, Any]:
    n = group.layout.world
    say(f"{group.name}: {n} processes, {', '.join(work.kind for work in network.works)}")

    def alone(_: Ranks | None) -> list[dict[str, Any]]:
        return [trained(None, network, group, work, base) for work in network.works]

    def together(ranks: Ranks | None) -> tuple[list[dict[str, Any]], Any]:
        counter = Counter(group.layout)
        if plant is not None:
            collectives.replace(plant)
        collectives.replace(counter.wrap)
        return [trained(ranks, network, group, work, base) for work in network.works], counter.counts

    expected = on_ranks(1, alone)
    if not expected.good:
        raise RuntimeError(f"one process failed:\n{expected.text}")
    ended = on_ranks(n, together, grace=20.0)
    facts: dict[str, Any] = {
        "name": group.name, "axes": list(group.axes), "ranks": n, "schedules": schedules_of(group), "faults": [],
    }  # fmt: skip
    if not ended.good:
        facts["faults"] = [f"{group.name}: {_why(ended)}"]
        return facts
    works = {}
    for number, work in enumerate(network.works):
        own = [value[0][number] for value in ended.values]
        compared = compare(own, expected.values[0][number])
        works[work.kind] = {"stage": work.stage, "steps": STEPS} | compared
        facts["faults"] += [f"{group.name}, {work.kind}: {text}" for text in beyond(compared)]
    counts = collectives.total([value[1] for value in ended.values])
    facts |= {"works": works, "collectives": counts}
    for axis in group.axes:
        kind = {FSDP: "dp", NODES: "ep"}.get(axis, axis)
        if not any(kind in axes.split(" x ") for axes in counts):
            facts["faults"].append(f"{group.name}: no message along {axis}")
    return facts


def schedules_of(group: RankGroup) -> list[str]:
    """The schedules of the steps, in order."""
    if group.layout.pp == 1:
        return []
    return [*dict.fromkeys(schedules.of_step(group.schedule, group.layout.pp, n)[0] for n in micro_batches(group))]


def compare(own: Sequence[dict[str, Any]], expected: dict[str, Any]) -> dict[str, Any]:
    """The largest differences of all ranks from one process, and where they are."""
    metric, later, gradient = (0.0, ""), (0.0, ""), (0.0, "")
    wanted, seen = expected["gradients"], set[str]()
    largest = max(float(np.linalg.norm(g)) for g in wanted.values())
    biases = True
    for rank in own:
        if rank["metrics"].keys() != expected["metrics"].keys():
            metric = (NOTHING, "a step")
            continue
        for step, values in expected["metrics"].items():
            for name, value in values.items():
                gap = abs(rank["metrics"][step].get(name, NOTHING) - value) / max(abs(value), TINY)
                gap, where = min(gap, NOTHING) if gap == gap else NOTHING, f"{name} of step {step}"
                if step > 1:
                    later = max(later, (gap, where))
                else:
                    metric = max(metric, (gap, where))
        for name, g in rank["gradients"].items():
            seen.add(name)
            norm = max(float(np.linalg.norm(wanted[name])), TINY * largest)
            gap = float(np.linalg.norm(g - wanted[name])) / norm
            gradient = max(gradient, (min(gap, NOTHING) if gap == gap else NOTHING, name))
        biases &= all(np.array_equal(bias, expected["biases"][name]) for name, bias in rank["biases"].items())
    if seen != wanted.keys():
        gradient = (NOTHING, f"{len(wanted.keys() - seen)} parameters")
    return {"losses": metric[0], "worst_loss": metric[1], "later": later[0], "worst_later": later[1],
            "gradients": gradient[0], "worst_gradient": gradient[1],
            "parameters": len(seen), "biases": bool(biases)}  # fmt: skip


def beyond(compared: dict[str, Any]) -> list[str]:
    """What exceeds its bound, as text."""
    found = []
    for name, what, bound in (
        ("losses", compared["worst_loss"], LOSSES), ("later", compared["worst_later"], LATER),
        ("gradients", f"the gradient of {compared['worst_gradient']}", GRADIENTS),
    ):  # fmt: skip
        if compared[name] >= NOTHING:
            found.append(f"{what} is missing or no number")
        elif not compared[name] <= bound:
            found.append(f"{what} differs by {compared[name]:.2g} of one process's, above {bound:g}")
    if not compared["biases"]:
        found.append("routing biases differ from one process's")
    return found


def _why(ended: Ended) -> str:
    """Why a group failed: the line that says it, or the last one."""
    lines = [line.strip() for line in ended.text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"error: |\w*(Error|Exception)\b", line)]
    code = next((f"rank {rank} ended with {code}" for rank, code in enumerate(ended.codes) if code), "")
    return f"{code}: {(named or lines or ['without a word'])[0][:300]}"


def _incidents(network: Miniature, group: RankGroup, base: Path, folder: Path, say: Say) -> dict[str, Any]:
    work, n = network.works[0], group.layout.world
    odd = n - 1
    say(f"{group.name}: a slow, a hung and a killed rank")

    def run(
        ranks: Ranks | None, fault: Incident | None = None, state: Path | None = None
    ) -> dict[int, dict[str, float]]:  # fmt: skip
        metrics: dict[int, dict[str, float]] = trained(ranks, network, group, work, base, state, fault)["metrics"]
        return metrics

    faults = []
    plain = on_ranks(n, run)
    slow = on_ranks(n, partial(run, fault=Incident(odd, 2, SLOW)))
    unchanged = plain.good and slow.good and slow.values == plain.values
    if not unchanged:
        faults.append(f"{group.name}: a rank that is {SLOW:g} s late changes the result")

    hung = on_ranks(n, partial(run, fault=Incident(odd, 2, HANG)), timeout=HANG_LIMIT, grace=10.0)
    report = next((line for line in hung.text.splitlines() if "has waited" in line), "").partition(". Exiting")[0]
    named = bool(re.search(rf"\brank {odd} has (been in|not reported)", report))
    if not named or watchdog.EXIT not in hung.codes:
        faults.append(f"{group.name}: the watchdog does not name the rank that hangs ({report or _why(hung)})")

    state = folder / "state"
    killed = on_ranks(n, partial(run, fault=Incident(odd, 3, 0.0), state=state), timeout=60.0, grace=END_LIMIT)
    lost = next((line for line in killed.text.splitlines() if "lost" in line), "")
    names_it = bool(re.search(rf"lost rank {odd}\b(?!,)", lost))
    if killed.late or not names_it:
        still = f"ranks {killed.late} still ran after {END_LIMIT:g} s" if killed.late else lost or _why(killed)
        faults.append(f"{group.name}: no clear end after rank {odd} was killed: {still}")
    resumed = on_ranks(n, partial(run, state=state))
    first = min(resumed.values[0]) if resumed.good and resumed.values[0] else 0
    equal = first > 1 and plain.good and all(
        values == {step: plain.values[0][step] for step in values} and max(values) == STEPS
        for values in resumed.values
    )  # fmt: skip
    if not equal:
        faults.append(f"{group.name}: the run that was killed does not go on with the same losses ({_why(resumed)})")
    return {
        "group": group.name, "rank": odd,
        "slow": {"seconds": SLOW, "unchanged": unchanged},
        "hung": {"limit": HANG_LIMIT, "named": named, "line": report},
        "killed": {"limit": END_LIMIT, "seconds": killed.seconds, "named": names_it, "line": lost,
                   "codes": killed.codes},
        "resumed": {"first_step": first, "equal": bool(equal)},
        "faults": faults,
    }  # fmt: skip


def _rollouts(network: Miniature, group: RankGroup, recipe: Recipe, base: Path, say: Say) -> dict[str, Any]:
    """RL's loop on the ranks of a group, against one process."""
    stage, n, recompute = network.rl, group.layout.world, recipe.layout.recompute
    assert stage is not None, "the network has an RL stage"
    say(f"{group.name}: rollouts and updates")
    prepared = on_ranks(1, lambda _: rollouts.write_base(network, base))
    facts: dict[str, Any] = {"group": group.name, "stage": stage.name, "faults": []}
    ended = [
        on_ranks(m, lambda ranks, m=m: rollouts.played(  # type: ignore[misc]
            ranks, network, group, stage, recompute, base, base / f"out-{m}"))
        for m in (1, n)
    ]  # fmt: skip
    for one in (prepared, *ended):
        if not one.good:
            facts["faults"].append(f"{group.name}, rollouts: {_why(one)}")
            return facts
    expected, own = ([line for line in one.values[0] if "rl/reward" in line] for one in ended)
    complete = len(own) == len(expected) == rollouts.ROLLOUTS
    worst = (0.0, "") if complete else (NOTHING, "the number of rollouts")
    for number, (mine, wanted) in enumerate(zip(own, expected, strict=False), 1):
        for name in ROLLOUT_METRICS:
            if name in wanted:
                gap = abs(mine.get(name, NOTHING) - wanted[name]) / max(abs(wanted[name]), SMALL)
                worst = max(worst, (min(gap, NOTHING) if gap == gap else NOTHING, f"{name} of rollout {number}"))
    facts |= {
        "rollouts": len(own), "difference": worst[0], "worst": worst[1],
        "rewards": [line["rl/reward"] for line in own],
    }  # fmt: skip
    if not worst[0] <= ROLLOUTS_BOUND:
        facts["faults"].append(
            f"{group.name}, rollouts: {worst[1]} differs by {worst[0]:.2g} of one process's, above {ROLLOUTS_BOUND:g}"
        )
    return facts
