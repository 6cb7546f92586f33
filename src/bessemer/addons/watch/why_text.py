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


def headline(explanation: Explanation) -> str:
    """The answer in one or two sentences."""
    if explanation.low <= 0 <= explanation.high:
        return "The reward did not rise by more than chance on these problems explains."
    if explanation.rise < 0:
        return "The reward fell."
    if not explanation.causes:
        return "The reward rose, but none of the causes examined explains it."
    first = explanation.causes[0]
    share = round(100 * first.part / explanation.rise)
    sentence = f"The reward rose mainly because the model {_verb(first)}: {share} % of the rise."
    paid = first.term if first.term != RIGHT or first.name == RIGHT else ""
    truth = explanation.right[1] - explanation.right[0]
    if paid and first.name != RIGHT and truth < 0.5 * explanation.rise:
        sentence += f" What pays for this is {paid}; right answers went from {_rates(explanation.right)}."
    return sentence


def describe(stage: str, explanation: Explanation) -> str:
    """The full explanation as text."""
    rise = f"{explanation.before:.3f} -> {explanation.after:.3f} ({explanation.low:+.3f} to {explanation.high:+.3f})"
    parts = [
        f"{stage}: reward {rise} on {_asked(explanation)}",
        headline(explanation),
        _terms(explanation.terms),
    ]
    if explanation.causes:
        parts.append(_causes(explanation))
    parts.append(_ability(explanation))
    means = [
        ["tokens per answer", *(f"{value:.0f}" for value in explanation.length)],
        ["own language", *(f"{value:.2f}" for value in explanation.language)],
        ["groups without contrast", *(f"{value:.2f}" for value in explanation.dead)],
    ]
    parts.append(page.grid([["means", "before", "after"], *means]))
    rows = [[escaped(flip.prompt.replace("\n", " "))[:PROMPT], f"{flip.before:.2f}", f"{flip.after:.2f}"]
             for flip in explanation.flips]  # fmt: skip
    parts.append(page.grid([["problems that changed most", "before", "after"], *rows]))
    parts.append("Causes are associations within groups, not experiments; a control reward or a replay tests them.")
    return "\n\n".join(parts)


def html(facts: RunFacts) -> Html:
    """What `bessemer why` has found about the run's models; "" if it has not been run with them."""
    parts = []
    digests = {other.name: done["digest"] for other in facts.stages if (done := read_done(other.folder))}
    for stage in facts.stages:
        record = read_json(facts.root / f"why-{stage.name}.json")
        if record is None or not (models := record.pop("models", {})) or not models.items() <= digests.items():
            continue  # not about these models: one was made again since
        explanation = Explanation.of_facts(record)
        rise = f"reward {explanation.before:.3f} → {explanation.after:.3f}, {_asked(explanation)}"
        parts += [page.heading(stage.name, rise), page.paragraph(headline(explanation), "lead")]
        if explanation.causes:
            parts.append(page.table(["because the model", "before", "after", "earns", "part of the rise"], [
                [f"{_verb(cause)} ({cause.term})", f"{cause.before:.2f}", f"{cause.after:.2f}", f"{cause.earns:+.2f}",
                 _part(cause, explanation.rise)]
                for cause in explanation.causes
            ], numeric=(1, 2, 3)))  # fmt: skip
        parts.append(page.paragraph(_ability(explanation), "sub"))
    return page.join(*parts)


def _asked(explanation: Explanation) -> str:
    heldout = explanation.problems - explanation.training
    kinds = [f"{n} {kind}" for n, kind in ((heldout, "held-out"), (explanation.training, "training")) if n]
    return f"{' and '.join(kinds)} problems x {explanation.samples} answers"


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


def _causes(explanation: Explanation) -> str:
    rows = [
        [escaped(f"{cause.term}: {cause.name}"), f"{cause.before:.2f}", f"{cause.after:.2f}", f"{cause.earns:+.2f}",
         f"{100 * cause.part / explanation.rise:+.0f}",
         f"{100 * cause.low / explanation.rise:+.0f} to {100 * cause.high / explanation.rise:+.0f}"]
        for cause in explanation.causes
    ]  # fmt: skip
    return page.grid([["because the model", "before", "after", "earns", "% of the rise", "95 %"], *rows])


def _ability(explanation: Explanation) -> str:
    before, after = explanation.right
    return (
        f"right answers: pass@1 {100 * before:.1f} -> {100 * after:.1f} %; pass@{explanation.samples} before: "
        f"{100 * explanation.some_before:.1f} %.\nOf the problems now solved in half the tries or more, "
        f"{explanation.sharpened} were solved occasionally before, {explanation.new} never in {explanation.samples} "
        f"tries."
    )
