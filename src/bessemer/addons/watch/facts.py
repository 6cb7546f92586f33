"""The facts of a run directory, read once for every view: stages, metrics as series, evaluations, samples, rollouts.

Nothing is computed or guessed here: what a run did not record is absent. The run may be unfinished, or running while it
is read.
"""

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json
from bessemer.runs.metrics import read_lines

_SAMPLE_HEADING = re.compile(r"^## ", re.MULTILINE)


@dataclass
class Series:
    """One metric of one stage over time. `values` are numbers, or lists of numbers (expert loads)."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


@dataclass
class StageFacts:
    """The folder of one stage."""

    name: str
    kind: str
    folder: Path
    finished: bool
    seconds: float
    summary: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    """Its table in the recipe."""
    lines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, values) in the order of writing."""
    series: dict[str, Series] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    contamination: dict[str, Any] = field(default_factory=dict)
    """Result of the contamination search (`addons/evals/contamination.py`)."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(heading, text) in the order of writing."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def learns_by_reward(self) -> bool:
        return any(name.startswith("rl/") for name in self.series)

    @property
    def source(self) -> str:
        """The stage whose model it starts from."""
        return str(self.settings.get("from", ""))


@dataclass
class RunFacts:
    """A run directory."""

    root: Path
    recipe: dict[str, Any]
    recipe_text: str
    stages: list[StageFacts]
    conformance: list[dict[str, Any]]
    finished_at: float
    """Unix time of the last record; 0 without any."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def names(self) -> set[str]:
        """What the recipe calls the run and its stages."""
        return {str(self.recipe.get("name", self.root.name)), *(name for s in self.stages for name in (s.name, s.kind))}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for stage in self.stages for row in stage.evaluations]


def read(root: Path) -> RunFacts:
    """The facts of the run in `root`; UserError if it is not a run, or one of its files is damaged."""
    try:
        text = (root / "recipe.toml").read_text(encoding="utf-8")
        recipe = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{root} is not a run directory: recipe.toml cannot be read ({error})") from None
    tables = {table.get("name", table.get("kind")): table for table in recipe.get("stage", [])}
    stages = [_stage(name, tables.get(name, {}), folder) for _, name, folder in stage_folders(root)]
    by_name = {stage.name: stage for stage in stages}
    last = 0.0
    for line in read_lines(root / "metrics.jsonl"):
        last = max(last, line.get("time") or 0.0)
        stage = by_name.get(line.get("stage", ""))
        if stage is None:
            continue
        values = line.get("values") or {}
        stage.lines.append((line.get("step", 0), values))
        for name, value in values.items():
            if value is not None:
                series = stage.series.setdefault(name, Series())
                series.steps.append(line.get("step", 0))
                series.tokens.append(line.get("tokens", 0))
                series.values.append(value)
    return RunFacts(root, recipe, text, stages, _rows(_json(root / "conformance.json")), last)


def _stage(name: str, settings: dict[str, Any], folder: Path) -> StageFacts:
    done = read_json(folder / "done.json")
    wall = done or read_json(folder / "wall.json") or {}
    results = _json(folder / "results.json")
    contamination = results.get("contamination") if isinstance(results, dict) else None
    return StageFacts(
        name=name, kind=settings.get("kind", ""), folder=folder, finished=done is not None,
        seconds=wall.get("seconds", 0.0), summary=(done or {}).get("summary", {}), settings=settings,
        evaluations=_rows(results), contamination=contamination if isinstance(contamination, dict) else {},
        samples=_samples(folder / "samples.md"), rollouts=list(read_lines(folder / "rollouts.jsonl")),
    )  # fmt: skip


def _json(path: Path) -> object:
    """The content of a file; an empty list if it does not exist."""
    try:
        return json.loads(path.read_bytes()) if path.exists() else []
    except ValueError:
        raise UserError(f"{path} is not valid JSON; delete it and run the recipe again") from None


def _rows(content: object) -> list[dict[str, Any]]:
    """A list of tables, bare or as "rows"; also {"before": {...}, "after": {...}}, whose keys name the model."""
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        content = content["rows"]
    elif isinstance(content, dict):
        content = [{"model": name, **row} for name, row in content.items() if isinstance(row, dict)]
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _samples(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if not _SAMPLE_HEADING.search(text):
        return [("samples.md", text)]
    samples = []
    for part in _SAMPLE_HEADING.split(text)[1:]:
        heading, _, body = part.partition("\n")
        lines = [line.removeprefix("    ") for line in body.strip("\n").split("\n")]
        samples.append((heading.strip(), "\n".join(lines)))
    return samples
