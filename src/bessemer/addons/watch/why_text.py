"""Why a reward rose, in words: for the terminal and the report card."""

from __future__ import annotations

from collections.abc import Mapping

from bessemer.addons.watch import page
from bessemer.addons.watch.facts import RunFacts
from bessemer.addons.watch.page import Html
from bessemer.addons.watch.why_reward import RIGHT, Cause, Explanation
from bessemer.escape import escaped
from bessemer.runs.directory import read_done
from bessemer.runs.files import read_json

PROMPT = 50
"""Characters of a prompt that are shown."""


def headline(found: Explanation) -> str:
    """The answer in one or two sentences."""
    if found.low <= 0 <= found.high:
        return "The reward did not rise by more than chance on these problems explains."
    if found.rise < 0:
        return "The reward fell."
    if not found.causes:
        return "The reward rose, but none of the causes examined explains it."
    first = found.causes[0]
    share = round(100 * first.part / found.rise)
    said = f"The reward rose mainly because the model {_verb(first)}: {share} % of the rise."
    paid = first.term if first.term != RIGHT or first.name == RIGHT else ""
    truth = found.right[1] - found.right[0]
    if paid and first.name != RIGHT and truth < 0.5 * found.rise:
        said += f" What pays for this is {paid}; right answers went from {_rates(found.right)}."
    return said


def describe(stage: str, found: Explanation) -> str:
    """The full explanation as text."""
    rise = f"{found.before:.3f} -> {found.after:.3f} ({found.low:+.3f} to {found.high:+.3f})"
    parts = [
        f"{stage}: reward {rise} on {_asked(found)}",
        headline(found),
        _terms(found.terms),
    ]
    if found.causes:
        parts.append(_causes(found))
    parts.append(_ability(found))
    means = [
        ["tokens per answer", *(f"{value:.0f}" for value in found.length)],
        ["own language", *(f"{value:.2f}" for value in found.language)],
        ["groups without contrast", *(f"{value:.2f}" for value in found.dead)],
    ]
    parts.append(page.grid([["means", "before", "after"], *means]))
    shown = [[escaped(flip.prompt.replace("\n", " "))[:PROMPT], f"{flip.before:.2f}", f"{flip.after:.2f}"]
             for flip in found.flips]  # fmt: skip
    parts.append(page.grid([["problems that changed most", "before", "after"], *shown]))
    parts.append("Causes are associations within groups, not experiments; a control reward or a replay tests them.")
    return "\n\n".join(parts)


def html(facts: RunFacts) -> Html:
    """What `bessemer why` has found about the run's models; "" if it has not been run with them."""
    parts = []
    digests = {one.name: done["digest"] for one in facts.stages if (done := read_done(one.folder))}
    for stage in facts.stages:
        kept = read_json(facts.root / f"why-{stage.name}.json")
        if kept is None or not (models := kept.pop("models", {})) or not models.items() <= digests.items():
            continue  # not about these models: one was made again since
        found = Explanation.of_facts(kept)
        rise = f"reward {found.before:.3f} → {found.after:.3f}, {_asked(found)}"
        parts += [page.heading(stage.name, rise), page.paragraph(headline(found), "lead")]
        if found.causes:
            parts.append(page.table(["because the model", "before", "after", "earns", "part of the rise"], [
                [f"{_verb(one)} ({one.term})", f"{one.before:.2f}", f"{one.after:.2f}", f"{one.earns:+.2f}",
                 _part(one, found.rise)]
                for one in found.causes
            ], numeric=(1, 2, 3)))  # fmt: skip
        parts.append(page.paragraph(_ability(found), "sub"))
    return page.join(*parts)


def _asked(found: Explanation) -> str:
    heldout = found.problems - found.training
    kinds = [f"{n} {kind}" for n, kind in ((heldout, "held-out"), (found.training, "training")) if n]
    return f"{' and '.join(kinds)} problems x {found.samples} answers"


def _part(cause: Cause, rise: float) -> Html:
    shares = sorted((cause.low / rise, cause.high / rise))
    bar = page.meter(max(0.0, cause.part / rise), (shares[0], shares[1]), strong=True)
    return Html(f"{100 * cause.part / rise:.0f} %{bar}")


def _verb(cause: Cause) -> str:
    """The cause as what the model does more often, or less."""
    if cause.name == RIGHT:
        return "answers correctly more often"
    how = "" if cause.after > cause.before else " less often"
    return escaped(cause.name) + how


def _rates(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.0f} to {100 * pair[1]:.0f} %"


def _terms(terms: Mapping[str, tuple[float, float]]) -> str:
    rows = [
        [name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"] for name, (before, after) in terms.items()
    ]
    return page.grid([["what was paid", "before", "after", "rise"], *rows])


def _causes(found: Explanation) -> str:
    rows = [
        [escaped(f"{cause.term}: {cause.name}"), f"{cause.before:.2f}", f"{cause.after:.2f}", f"{cause.earns:+.2f}",
         f"{100 * cause.part / found.rise:+.0f}",
         f"{100 * cause.low / found.rise:+.0f} to {100 * cause.high / found.rise:+.0f}"]
        for cause in found.causes
    ]  # fmt: skip
    return page.grid([["because the model", "before", "after", "earns", "% of the rise", "95 %"], *rows])


def _ability(found: Explanation) -> str:
    before, after = found.right
    return (
        f"right answers: pass@1 {100 * before:.1f} -> {100 * after:.1f} %; pass@{found.samples} before: "
        f"{100 * found.some_before:.1f} %.\nOf the problems now solved in half the tries or more, "
        f"{found.sharpened} were solved occasionally before, {found.new} never in {found.samples} tries."
    )
