"""A certificate as one HTML page, and as lines for a terminal: the verdict and its reasons first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html

RUN, COMPUTED, UNPROVED = "1. What was run", "2. What was computed", "3. What remains unproved"


def document(facts: dict[str, Any]) -> str:
    title = f"Rehearsal: {_what(facts)}"
    hashes = facts["hashes"]
    lead = (
        f"{facts['recipe']}{''.join(f' --set {item}' for item in facts['set'])}; recipe {hashes['recipe'][:12]}, code "
        f"{hashes['code'][:12]}, torch {facts['versions']['torch']}"
    )
    reasons = "".join(f"<li>{page.text(reason)}</li>" for reason in facts["reasons"])
    head = page.join(
        Html(f"<h1>{page.text(facts['verdict'])}: {page.text(title)}</h1>"), page.paragraph(lead, "lead"),
        Html(f"<ul>{reasons}</ul>") if reasons else "",
    )  # fmt: skip
    rest = "".join(f"<li>{page.text(line)}</li>" for line in facts["unproved"])
    parts = [
        page.section("run", RUN, page.join(*map(_network, facts["run"])) or "nothing", _run_lead(facts)),
        page.section("computed", COMPUTED, _computed(facts["computed"]), "The full size, from shapes; none of it ran."),
        page.section("unproved", UNPROVED, Html(f"<ul>{rest}</ul>")),
    ]  # fmt: skip
    return page.document(title, page.join(head, *parts))


def _what(facts: dict[str, Any]) -> str:
    """The recipe, the part of it that was rehearsed, and the cluster."""
    part = f" up to {facts['until']}" if facts["until"] else ""
    return f"{facts['name']}{part} on {facts['cluster']}"


def _run_lead(facts: dict[str, Any]) -> str:
    bounds = facts["bounds"]
    return (
        f"A miniature on at most {facts['processes']} processes over gloo, in float32, against one process. Bounds "
        f"on relative differences: {bounds['losses']:g} for metrics and {bounds['gradients']:g} for gradients of the "
        f"first step, {bounds['later']:g} for metrics of later steps."
    )


def _network(ran: dict[str, Any]) -> Html:
    rows = []
    for group in ran["groups"]:
        schedules = ", ".join(group["schedules"]) or "-"
        for kind, work in group.get("works", {}).items():
            biases = "equal" if work["biases"] else "differ"
            rows.append((group["name"], schedules, f"{kind} ({work['stage']})", str(work["steps"]),
                         *(f"{work[name]:.1e}" for name in ("losses", "gradients", "later")), biases))  # fmt: skip
        if "works" not in group:
            rows.append((group["name"], schedules, "failed", "", "", "", "", ""))
    table = page.table(
        ("ranks", "schedule", "objective", "steps", "metrics differ by", "gradients by",
         "later metrics by", "routing biases"), rows,
        (3, 4, 5, 6),
    )  # fmt: skip
    messages = [
        (group["name"], axes, operation, f"{calls:,}", f"{size / 1e6:,.2f}")
        for group in ran["groups"]
        for axes, operations in group.get("collectives", {}).items()
        for operation, (calls, size) in operations.items()
    ]
    counted = page.table(("ranks", "along", "operation", "calls", "MB given"), messages, (3, 4))
    lines = "".join(f"<li>{page.text(line)}</li>" for line in _incidents(ran))
    return page.join(page.heading(ran["network"]), table, Html(f"<ul>{lines}</ul>") if lines else "",
                     page.fold("Messages of all ranks", counted))  # fmt: skip


def _incidents(ran: dict[str, Any]) -> Iterator[str]:
    if facts := ran.get("incidents"):
        slow, hung, killed, resumed = (facts[name] for name in ("slow", "hung", "killed", "resumed"))
        rank, group = facts["rank"], facts["group"]
        change = "changes nothing" if slow["unchanged"] else "changes the result"
        yield f"{group}: rank {rank} {slow['seconds']:g} s late {change}"
        named = "is named" if hung["named"] else "is not named"
        yield f"{group}: rank {rank} hangs for more than {hung['limit']:g} s and {named}: {hung['line']}"
        yield f"{group}: rank {rank} is killed; the others end within {killed['seconds']:.1f} s: {killed['line']}"
        same = "same" if resumed["equal"] else "other"
        yield f"{group}: the run goes on from its checkpoint at step {resumed['first_step']} with the {same} metrics"
    if facts := ran.get("rollouts"):
        yield (
            f"{facts['group']}: RL's loop ({facts['stage']}), {facts.get('rollouts', 0)} rollouts: metrics differ by "
            f"{facts.get('difference', 1e99):.1e} from one process's"
        )


def _computed(facts: dict[str, Any]) -> Html:
    stages = facts["stages"]
    memory = []
    for stage in stages:
        if "memory" not in stage:
            continue
        own = stage["memory"]
        fullest = max(own["by_rank"], key=lambda row: row["gib"])
        low, high = fullest["ranks"]
        if not fullest["kinds"]:
            each, n = own["workers"]["gib_each"], own["workers"]["devices"]
            memory.append((stage["stage"], f"{n:,} that sample", f"{each:,.1f}", f"{own['room_gib']:,.1f}",
                           page.meter(each / own["room_gib"])))  # fmt: skip
            continue
        memory.append((stage["stage"], f"{low:,} to {high:,}", f"{fullest['gib']:,.1f}", f"{own['room_gib']:,.1f}",
                       page.meter(fullest["gib"] / own["room_gib"])))  # fmt: skip
    tables = [
        (stage["stage"], one["schedule"], f"{one['ranks']}", f"{one['micro_batches']:,}", f"{one['actions']:,}",
         "complete, no deadlock")
        for stage in stages for one in stage.get("tables", ())
    ]  # fmt: skip
    messages = [
        (stage["stage"], axis, f"{sent['messages']:,}" if "messages" in sent else "-", f"{sent['bytes'] / 1e9:,.2f}",
         stage["messages"]["per"])
        for stage in stages for axis, sent in stage.get("messages", {}).get("axes", {}).items()
    ]  # fmt: skip
    divided = [(stage["stage"], _divided(stage["divided"])) for stage in stages if "divided" in stage]
    saved = [
        (stage["stage"], *(f"{stage['checkpoint'][key] / 1e12:,.3f}" for key in ("state_bytes", "model_bytes")))
        for stage in stages if "checkpoint" in stage
    ]  # fmt: skip
    ranks = [
        (stage["stage"], "{:,} to {:,}".format(*row["ranks"]), f"{row['gib']:,.1f}",
         ", ".join(f"{kind} {size:,.1f}" for kind, size in row["kinds"].items() if size >= 0.05))
        for stage in stages if "memory" in stage for row in stage["memory"]["by_rank"]
    ]  # fmt: skip
    notes = [f"{stage['stage']}: {note}" for stage in stages for note in stage.get("notes", ())]
    lines = "".join(f"<li>{page.text(note)}</li>" for note in notes)
    return page.join(
        page.heading("Memory of the fullest rank", "GiB"),
        page.table(("stage", "ranks", "needed", "of", "share"), memory, (2, 3)),
        page.fold("Memory of every rank", page.table(("stage", "ranks", "GiB", "of which"), ranks, (2,))),
        page.heading("Pipelines"),
        page.table(("stage", "schedule", "ranks", "micro-batches", "actions", "table"), tables, (2, 3, 4)),
        page.heading("Division"), page.table(("stage", "on a rank"), divided),
        Html(f"<ul>{lines}</ul>") if lines else "",
        page.heading("Messages of a rank in the middle"),
        page.table(("stage", "along", "messages", "GB", "per"), messages, (2, 3)),
        page.heading("Checkpoints", "TB"), page.table(("stage", "to resume from", "model"), saved, (1, 2)),
    )  # fmt: skip


def _divided(divided: dict[str, Any]) -> str:
    layers = divided["layers_by_stage"]
    spread = f"{min(layers)}" if min(layers) == max(layers) else f"{min(layers)} to {max(layers)}"
    return (
        f"{spread} layers a stage, {divided['experts_per_rank']} experts of a layer, micro-batches of "
        f"{divided['rows_per_micro_batch']} rows ({divided['tokens_per_rank']:,} tokens on a rank), "
        f"{divided['pipelines']:,} pipelines"
    )


def describe(facts: dict[str, Any]) -> str:
    """The certificate for a terminal."""
    hashes = facts["hashes"]
    lines = [f"{facts['verdict']}: {_what(facts)}"]
    lines += [f"  because {reason}" for reason in facts["reasons"]]
    lines += [f"  recipe {hashes['recipe'][:12]}, code {hashes['code'][:12]}", "", RUN]
    for ran in facts["run"]:
        lines.append(f"  {ran['network']}")
        for group in ran["groups"]:
            for kind, work in group.get("works", {}).items():
                schedules = f" ({', '.join(group['schedules'])})" if group["schedules"] else ""
                lines.append(
                    f"  {group['name']}{schedules}, {kind}: metrics differ by {work['losses']:.1e}, gradients by "
                    f"{work['gradients']:.1e}, later metrics by {work['later']:.1e}"
                )
        lines += [f"  {line}" for line in _incidents(ran)]
    lines += [] if facts["run"] else ["  nothing"]
    lines += ["", COMPUTED]
    for stage in facts["computed"]["stages"]:
        if "memory" in stage:
            fullest = max(stage["memory"]["by_rank"], key=lambda row: row["gib"])
            tables = ", ".join(f"{one['schedule']} with {one['micro_batches']}" for one in stage.get("tables", ()))
            low, high = fullest["ranks"]
            if not fullest["kinds"]:
                workers, room = stage["memory"]["workers"], stage["memory"]["room_gib"]
                lines.append(
                    f"  {stage['stage']}: {workers['gib_each']:,.1f} of {room:,.1f} GiB on each of "
                    f"{workers['devices']:,} devices that sample"
                )
                continue
            lines.append(
                f"  {stage['stage']}: {fullest['gib']:,.1f} of {stage['memory']['room_gib']:,.1f} GiB on ranks {low:,} "
                f"to {high:,}" + (f"; tables complete, no deadlock: {tables}" if tables else "")
            )
    lines += ["", UNPROVED, *(f"  {line}" for line in facts["unproved"])]
    return "\n".join(lines)
