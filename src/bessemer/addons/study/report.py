"""What the runs of a study say so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.addons.study import figures
from bessemer.addons.study.file import RuleTable, Study
from bessemer.addons.study.machine import machine
from bessemer.addons.study.rule import Comparison, StudyVerdict, compare, verdict


class StudyReport:
    """A study's results, comparisons and verdict."""

    def __init__(self, study: Study, results: Sequence[Mapping[str, Any]]) -> None:
        """`results`: of the runs that have ended, as in result.json."""
        self.study, self.results = study, results
        table = study.table
        self.values: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in table.arm}
        for result in results:
            instead = {name: figure.failed for name, figure in table.figure.items() if figure.failed is not None}
            self.values[result["arm"]][result["seed"]] = instead if result["failed"] else result["figures"]
        self.rules = [self._compare(rule, len(table.rule)) for rule in table.rule]
        self.controls = [self._compare(rule, 1) for rule in table.control]
        self.verdict, self.why = verdict(self.rules, self.controls)
        if self.unfinished:
            self.verdict, self.why = StudyVerdict.UNCLEAR, [f"{self.unfinished} runs have not ended", *self.why]

    def _compare(self, rule: RuleTable, rules: int) -> Comparison:
        table = self.study.table
        values, missing = figures.differences(self.values, self.study, rule.first, rule.second, table.seeds)
        ended = [seed for seed in missing if all(seed in self.values[side.arm] for side in self.study.sides(rule))]
        return compare(rule, values, ended, table.confidence, table.power, rules)

    @property
    def runs(self) -> int:
        """How many runs of arms the study has."""
        return len(self.study.table.arm) * len(self.study.table.seeds)

    @property
    def unfinished(self) -> int:
        return self.runs - len(self.results)

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        return [result for result in self.results if result["failed"]]

    def facts(self) -> dict[str, Any]:
        table = self.study.table
        return {
            "name": table.name, "question": table.question, "claim": table.claim, "verdict": self.verdict,
            "why": self.why, "hash": self.study.hash, "machine": machine(),
            "runs": {"all": self.runs, "ended": len(self.results), "failed": len(self.failed)},
            "minutes": round(sum(result["seconds"] for result in self.results) / 60, 1),
            "confidence": table.confidence, "power": table.power,
            "rules": [rule.facts() for rule in self.rules], "controls": [rule.facts() for rule in self.controls],
            "arms": {name: arm.about for name, arm in table.arm.items()},
            "results": [{key: result[key] for key in ("arm", "seed", "figures", "failed", "attempts", "seconds")}
                        for result in self.results],
        }  # fmt: skip
