"""Both rules side by side, as Markdown: what changed, the counts, every claim with its old verdict and new answers."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer_claims import registry, verdict
from bessemer_claims.cards import Card, counts, totals

CHANGES = (
    "One verdict answered two questions. Now documents answer whether a claim is true of DeepSeek's models, and "
    "runs whether small networks show it.",
    "Holm's correction was announced, and no verdict used it. Benjamini and Hochberg's procedure decides now: of "
    "the parts of runs that hold or fail, no more than a twentieth is expected to do so by chance.",
    "The smallest effect of interest decides for above and below, too: an effect that is shown to be smaller "
    "fails. Under rules 1 it decided only for equal.",
    "Every positive control can fail. Those of Z2 and Z3 were the effect itself, P2's had to be above 0, Z10 and "
    "M11 had none.",
    "The same value in every run has no interval and no p value.",
    "The A/A test has 95 % instead of 99 and is none with fewer than five seeds. Before, it could hardly fail.",
    "This package's agreement with the figures typed into it, and the planner's predictions, answer neither question.",
    "Where the claim is that something was done (R1, R2, D1, D3), runs that ask whether it helps stand beside.",
    "M8 asked what M7 asked; it has a question of its own. L10 counts grouped heads. R5 asks for all that it claims.",
    "Ratios to 1 have a margin to 1: P2 had to be below a half, F3 below 0.6. Set after their results were known, "
    "as all of rules 2: P2's new control, ZB1P, had just missed the half.",
)


def compared(cards: Sequence[Card]) -> str:
    """Verdicts under rules 1 beside the answers under rules 2: changes, counts, then every claim."""
    rules = registry.rules()
    before = counts(cards)
    old = ", ".join(f"{number} {verdict}" for verdict, number in before.items() if number)
    lines = [
        "# The claims under both rules", "",
        f"Rules 2 ({rules.date}) are `claims/src/bessemer_claims/rules.toml`, SHA-256 {registry.rules_hash()[:16]};",
        f"rules 1 are `rules-1.toml` beside it, {rules.before[0][:16]}. `bessemer claims --rules` prints this page.",
        "",
        f"- {sum(before.values())} claims under rules 1: {old}.",
        f"- {len(cards)} claims under rules 2: {totals(cards)}.",
        "",
        "What changed:", "", *(f"- {change}" for change in CHANGES), "",
        "| | rules 1 | documented | seen in small | parts that hold | claim |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *map(_row, cards)]) + "\n"


def _row(card: Card) -> str:
    held = {
        "documents": verdict.parts_held(card.findings, "documents"), "runs": verdict.parts_held(card.findings, "seen")
    }  # fmt: skip
    parts = ", ".join(f"{name} {holds} of {of}" for name, (holds, of) in held.items() if of)
    same = f" (as {card.same_as})" if card.same_as else ""
    answers = f"{card.rules_1 or 'new'} | {card.documented} | {card.seen}"
    return f"| {card.name} | {answers} | {parts} | {card.claim.text[0]}{same} |"
