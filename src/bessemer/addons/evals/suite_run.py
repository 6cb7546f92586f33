"""`bessemer eval --suite`: samples a model's answers to every evaluation of a suite, and scores them.

Answers are written to OUT/NAME.jsonl as they come: first a line with the settings, then one line per answer:

    problem         id of the problem in the data, or its number from 1
    text            the answer; `reasoning` (or reasoning_content) before it if the thoughts are stored separately
    evaluation      needed only if several evaluations run and the file is not called NAME.jsonl
    sample          number of the answer, from 0; optional, as are tokens and finish_reason
    question        a hash of the prompt, which must match that of the problem; optional

A second call resumes where the first was killed, and samples what it would have sampled: answer k to a problem depends
only on the seed, the problem and k. OUT/results.json joins the rows of calls with the same model and sampling. Answers
of any origin can also be scored from such lines, without a model.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from bessemer.addons.evals.endpoint import Endpoint
from bessemer.addons.evals.evaluate import between, percent
from bessemer.addons.evals.suites import FOLDER, Evaluation, Given, check_places, choose, find, load, load_suite
from bessemer.addons.families import data_sets
from bessemer.config.places import HUB
from bessemer.data.chat import THINK, THINK_END, question_ids
from bessemer.data.fingerprints import sha256_of_all
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.runs.files import read_json, write_json
from bessemer.system import claim
from bessemer.tasks import Problem, stable_hash
from bessemer.train import setup

ROWS = 64
"""Answers that a process generates together: a kill loses at most this many per process."""
RESULTS = "results.json"
SEED_BITS = (1 << 31) - 1
"""Of an endpoint's seeds: some take no larger ones."""
SAMPLED = ("temperature", "top_p", "max_new_tokens")
OPTIONAL = {"tokens": int, "finish_reason": str, "reasoning": str, "reasoning_content": str}
Answers = dict[str, dict[int, scoring.Answer]]
"""Id of a problem -> number of the sample -> answer."""


@dataclass(frozen=True)
class Sampling:
    """How a call samples: as set by the suite or the user."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Ready:
    """An evaluation whose data is available."""

    evaluation: Evaluation
    task: Given
    problems: list[Problem]

    @property
    def name(self) -> str:
        return self.evaluation.name


def evaluate_suite(
    model: Path | Endpoint | None,
    *,
    suite: str,
    only: Sequence[str] = (),
    data: Sequence[str] = (),
    answers: Path | None = None,
    out: Path | None = None,
    problems: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    **changes: float,
) -> dict[str, Any]:
    """{suite, model, rows, skipped} for a model or an endpoint, or without one for a file of `answers`. `samples` and
    `changes` (of temperature, top_p, max_new_tokens) replace the suite's own. UserError if no evaluation can be run."""
    chosen = load_suite(suite)
    evaluations = choose(chosen, only)
    check_places(data, evaluations)
    if answers is not None and not answers.exists():
        raise UserError(f"--answers {answers}: no such file or folder; name the file of answers, or its folder")
    ready, skipped = prepare(evaluations, data or [str(FOLDER)], problems)
    result: dict[str, Any] = {"suite": suite, "model": _name(model) or str(answers), "rows": [], "skipped": skipped}
    if model is not None:
        out = out or Path("evals") / suite / _label(model)
    if out is not None and (out / RESULTS).exists() and "suite" not in (read_json(out / RESULTS) or {}):
        raise UserError(f"{out / RESULTS} does not belong to a suite; choose another folder with --out")
    if model is not None:
        assert out is not None
        defaults = {name: getattr(chosen, name) for name in SAMPLED}
        rows = run(model, ready, Sampling(**defaults | changes, seed=seed), samples, out) if ready else iter(())
    else:
        assert answers is not None
        rows = score_file(answers, ready)
    for row in rows if ready else ():
        result["rows"].append({"model": result["model"]} | row)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            joined = _joined(out, result)
            there = {row["task"] for row in joined}
            missing = [entry for entry in skipped if entry["evaluation"] not in there]
            write_json(out / RESULTS, result | {"rows": joined, "skipped": missing})
    for entry in skipped:
        _say("skipped " + entry["reason"])
    if not result["rows"]:
        raise UserError(
            f"nothing was evaluated: {len(evaluations)} of {len(evaluations)} evaluations lack their data or answers "
            "(see above)"
        )
    return result


def _joined(out: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result, after those that earlier calls with the same model and sampling left in the folder, or with
    the same answers."""

    def key(of: dict[str, Any], row: dict[str, Any]) -> list[Any]:
        header = _header(out / f"{row['task']}.jsonl") or {}
        return [of["suite"], of["model"], header.get("model"), header.get("sampling")]

    def holds(row: dict[str, Any]) -> bool:
        if "answers" not in result["rows"][-1]:
            return key(earlier, row) == key(result, result["rows"][-1])
        file = _answers_to(row["task"], Path(result["model"]))
        identity = [earlier["suite"], earlier["model"], row.get("answers")]
        return file.is_file() and identity == [result["suite"], result["model"], *sha256_of_all([file])]

    earlier, rows = read_json(out / RESULTS) or {}, result["rows"]
    kept = [row for row in earlier.get("rows", []) if holds(row)]
    return list({row["task"]: row for row in (*kept, *rows)}.values())


def prepare(
    evaluations: Sequence[Evaluation], places: Sequence[str], problems: int | None
) -> tuple[list[Ready], list[dict[str, str]]]:
    """The evaluations whose data is available, with every row checked, and {evaluation, reason} for the others."""
    ready, skipped = [], []
    folder = Path(next((path for path in places if "=" not in path and path != HUB), FOLDER))
    for evaluation in evaluations:
        spec = find(evaluation, places)
        if spec is None:
            skipped.append({"evaluation": evaluation.name, "reason": evaluation.wanted(folder)})
            continue
        try:
            ready.append(Ready(evaluation, *load(evaluation, spec, problems)))
        except UserError as error:
            if HUB not in places or not str(error).startswith(f"{spec} cannot be read"):
                raise
            skipped.append({"evaluation": evaluation.name, "reason": f"{evaluation.name}: {error}"})
            continue
        count = len(ready[-1].task.ids)
        if evaluation.problems not in (None, count):
            _say(f"{evaluation.name}: {spec} has {count} problems, but {evaluation.title} has {evaluation.problems}")
    return ready, skipped


def run(
    model: Path | Endpoint, ready: Sequence[Ready], sampling: Sampling, samples: int | None, out: Path
) -> Iterator[dict[str, Any]]:
    """Yields the row of each evaluation as soon as all its answers are there. One process at a time writes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+") as lock:
        lock.seek(0)
        if not claim(lock, lock.read().strip()):
            raise UserError(f"another evaluation is writing to {out}; wait for it, or choose another folder with --out")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield from _run(model, ready, sampling, samples, out)
        lock.truncate(0)


def _run(
    model: Path | Endpoint, ready: Sequence[Ready], sampling: Sampling, samples: int | None, out: Path
) -> Iterator[dict[str, Any]]:
    sample: Callable[[Ready, Sampling, int, Path], None]
    if isinstance(model, Endpoint):
        identity, sample = model.identity, partial(_ask, model)
    else:
        identity, sample = _loaded(model, sampling)
    _say(f"answers are kept in {out}; after an interruption, the same command continues")
    for item in ready:
        file, count = out / f"{item.name}.jsonl", samples or item.evaluation.samples
        header = {"evaluation": item.name, "model": identity, "sampling": asdict(sampling)}
        _open(file, header)
        sample(item, sampling, count, file)
        answers = read_answers(file, [item])[item.name]
        kept = {key: {n: group[n] for n in sorted(group)[:count]} for key, group in answers.items()}
        yield _row(item, kept, sampling)


def _loaded(model: Path, sampling: Sampling) -> tuple[dict[str, str], Callable[[Ready, Sampling, int, Path], None]]:
    """(digests of the weights, what samples) of a model directory."""
    setup.keep_memory()
    engine = Engine(*setup.load_to_sample(model, _say), setup.workers())
    longest = engine.model.cfg.max_seq_len
    if longest < sampling.max_new_tokens:
        _say(f"the model's context of {longest} tokens truncates answers; {sampling.max_new_tokens} were requested")
    files = sorted(model.glob("*.safetensors"))
    return dict(zip([file.name for file in files], sha256_of_all(files), strict=True)), partial(_sample, engine)


def score_file(path: Path, ready: Sequence[Ready]) -> Iterator[dict[str, Any]]:
    """Yields a row for every evaluation that a file, or a folder of NAME.jsonl files, has answers to, with that
    file's SHA-256 under `answers`."""
    files = list(dict.fromkeys(file for evaluation in ready if (file := _answers_to(evaluation.name, path)).is_file()))
    if not files:
        raise UserError(f"--answers {path}: no such file, and no folder with the NAME.jsonl of an evaluation")
    answers: dict[str, Answers] = {}
    for file in files:
        answers |= read_answers(file, [evaluation for evaluation in ready if evaluation.name == file.stem] or ready)
    for evaluation in ready:
        if any(problem.id in answers.get(evaluation.name, {}) for problem in evaluation.problems):
            (digest,) = sha256_of_all([_answers_to(evaluation.name, path)])
            yield _row(evaluation, answers[evaluation.name]) | {"answers": digest}
        else:
            _say(f"{evaluation.name}: {path} has no answers to these problems")


def _answers_to(name: str, path: Path) -> Path:
    """The file of the answers to an evaluation, in a file of answers or a folder of them."""
    return path if path.is_file() else path / f"{name}.jsonl"


def _row(item: Ready, answers: Answers, sampling: Sampling | None = None) -> dict[str, Any]:
    answered = [problem for problem in item.problems if problem.id in answers]
    if len(answered) < len(item.problems):
        _say(f"{item.name}: answers to {len(answered)} of {len(item.problems)} problems; only these are scored")
    groups = [[group[n] for n in sorted(group)] for group in (answers[problem.id] for problem in answered)]
    k = min(map(len, groups))
    how: dict[str, Any] = {name: getattr(sampling, name, None) for name in SAMPLED}
    row = scoring.judge(item.task, answered, groups, k=k, **how)
    published = {model: round(percent / 100, 4) for model, percent in item.evaluation.published.items()}
    return row | {"title": item.evaluation.title, "published": published, "source": item.evaluation.source}


def _sample(engine: Engine, evaluation: Ready, sampling: Sampling, samples: int, file: Path) -> None:
    """Generates the answers that the file lacks, and appends them."""
    there = read_answers(file, [evaluation]).get(evaluation.name, {})
    problems = evaluation.problems
    plan = engine.plan(
        [question_ids(engine.tokenizer, problem.prompt) for problem in problems],
        seeds=[stable_hash("eval", sampling.seed, evaluation.name, problem.id) & (2**62 - 1) for problem in problems],
        samples=samples, temperature=sampling.temperature, top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens, batch_rows=ROWS,
    )  # fmt: skip
    batches = []
    for batch in plan.batches:
        unanswered = [
            sample for sample in batch.samples if sample.sample not in there.get(problems[sample.prompt].id, {})
        ]
        batches += [replace(batch, samples=unanswered)] if unanswered else []
    missing = sum(len(batch.samples) for batch in batches)
    _say(f"{evaluation.name}: {len(problems)} problems, {samples} answers each, {missing} to generate")
    with file.open("a", encoding="utf-8") as written:
        for batch, completions in zip(batches, engine.workers.map(engine.run, batches), strict=True):
            for sample, completion in zip(batch.samples, completions, strict=True):
                problem, answer = problems[sample.prompt], scoring.answer_of(completion, engine.tokenizer.opening)
                _write(written, problem, sample.sample, answer)
            written.flush()
            os.fsync(written.fileno())


def _ask(endpoint: Endpoint, evaluation: Ready, sampling: Sampling, samples: int, file: Path) -> None:
    """`_sample` by an endpoint."""
    there = read_answers(file, [evaluation]).get(evaluation.name, {})
    missing = [
        (problem, number)
        for problem in evaluation.problems
        for number in range(samples)
        if number not in there.get(problem.id, {})
    ]
    _say(f"{evaluation.name}: {len(evaluation.problems)} problems, {samples} answers each, {len(missing)} to generate")
    options = {name: getattr(sampling, name) for name in SAMPLED}
    with file.open("a", encoding="utf-8") as written:
        for first in range(0, len(missing), ROWS):
            batch = missing[first : first + ROWS]
            asked = [
                (problem.prompt, stable_hash("eval", sampling.seed, evaluation.name, problem.id, number) & SEED_BITS)
                for problem, number in batch
            ]
            try:
                for place, answer in endpoint.answers(asked, **options):
                    _write(written, *batch[place], answer)
            finally:
                written.flush()
                os.fsync(written.fileno())


def _write(written: TextIO, problem: Problem, number: int, answer: scoring.Answer) -> None:
    line = {"problem": problem.id, "sample": number, "question": _digest(problem), **asdict(answer)}
    written.write(json.dumps(line, ensure_ascii=False) + "\n")


def _open(file: Path, header: dict[str, Any]) -> None:
    """Starts a file of answers, or checks that its settings are these. Removes an incomplete line at its end, which a
    kill may leave."""
    text, begun = file.read_bytes() if file.is_file() else b"", json.dumps(header).encode()
    lines = text[: text.rfind(b"\n") + 1]
    if begun.startswith(text):
        file.write_bytes(begun + b"\n")
        return
    existing = _header(file)
    if existing == header:
        os.truncate(file, len(lines))
    else:
        differ = " and ".join(key for key in header if (existing or {}).get(key) != header[key])
        raise UserError(f"{file} has answers from a different {differ}; choose another folder with --out, or delete it")


def _header(file: Path) -> dict[str, Any] | None:
    """The settings of a file of answers; None if it has none."""
    try:
        with file.open("rb") as lines:
            header = json.loads(lines.readline())
    except (FileNotFoundError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def read_answers(file: Path, ready: Sequence[Ready]) -> dict[str, Answers]:
    """The answers of a file by the name of their evaluation, which a line need not state if only one is `ready`."""
    by_name = {evaluation.name: evaluation for evaluation in ready}
    prompts = {
        evaluation.name: {problem.id: _digest(problem) for problem in evaluation.problems} for evaluation in ready
    }
    ids = {evaluation.name: set(evaluation.task.ids) for evaluation in ready}
    answers: dict[str, Answers] = {}
    own_file = False
    for where, record in data_sets.records(file):
        if "sampling" in record and "text" not in record:
            own_file = True
            continue  # the settings
        name = record.get("evaluation", ready[0].name if len(ready) == 1 else None)
        if not isinstance(name, str) or name not in by_name:
            raise UserError(f"{where}: evaluation is {name!r}; it must be one of those being run: {', '.join(by_name)}")
        key, text = record.get("problem"), record.get("text")
        if isinstance(key, bool) or not isinstance(key, str | int) or not isinstance(text, str):
            raise UserError(f"{where}: needs problem (the id or number of a problem) and text (the answer)")
        if str(key) not in ids[name]:
            some = ", ".join(by_name[name].task.ids[:3])
            raise UserError(f"{where}: {name} has no problem {key!r}; its problems are {some}, ...")
        if record.get("question", digest := prompts[name].get(str(key))) != digest and digest is not None:
            raise UserError(f"{where}: problem {key!r} had another question; the data or its prompt has changed")
        group = answers.setdefault(name, {}).setdefault(str(key), {})
        number = record.get("sample", len(group))
        if isinstance(number, bool) or not isinstance(number, int) or (number in group and not own_file):
            raise UserError(f"{where}: sample is {number!r}; give every answer to a problem its own number")
        for field, kind in OPTIONAL.items():
            if (value := record.get(field)) is not None and type(value) is not kind:
                expected = "a whole number" if kind is int else "text"
                raise UserError(f"{where}: {field} is {value!r}; make it {expected}, or leave it out")
        if number in group:
            continue  # two processes without the lock once wrote to one file
        answer = text if own_file else _whole(record, text)  # ours begin with the opening tag if the prompt held it
        group[number] = scoring.Answer(answer, record.get("tokens"), record.get("finish_reason"))
    return answers


def _whole(record: dict[str, Any], text: str) -> str:
    """The answer with its thoughts and the opening tag. The prompt held that tag if thoughts are closed but not opened,
    or if an answer without tags was cut off."""
    thoughts = record.get("reasoning") or record.get("reasoning_content")
    if thoughts is not None:
        return f"{THINK}\n{thoughts}\n{THINK_END}\n\n{text}"
    beginning, closed, _ = text.partition(THINK_END)
    begun = THINK not in beginning and (closed or record.get("finish_reason") == "length")
    return f"{THINK}\n{text}" if begun else text


def _digest(problem: Problem) -> str:
    return f"{stable_hash(problem.prompt):016x}"


def _name(model: Path | Endpoint | None) -> str | None:
    """The model in results."""
    return f"{model.http.url} {model.model}" if isinstance(model, Endpoint) else str(model) if model else None


def _label(model: Path | Endpoint) -> str:
    """A name for the folder of a model's answers: `tiny-03-zero` for runs/tiny/03-zero/model."""
    if isinstance(model, Endpoint):
        return re.sub(r"[^\w.-]+", "-", model.model).strip("-.") or "endpoint"
    parts = model.resolve().parts
    return parts[-1] if parts[-1] != "model" else "-".join(parts[-3:-1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def suite_table(rows: list[dict[str, Any]]) -> Table:
    """The evaluations of a suite, each next to the published figures. Programs have no cons@k: two rarely agree."""
    models = list(dict.fromkeys(model for row in rows for model in row["published"]))
    title = f"{rows[0]['model']}, and as published"
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("evaluation", "n", "k", "pass@1", "95 % interval", "cons@k", "cut off", "tokens", *models):
        grid.add_column(column, justify="left" if column == "evaluation" else "right")
    for row in rows:
        length = row["mean_length"]
        grid.add_row(
            row["title"], str(row["n"]), str(row["k"]), percent(row["pass_at_1"]), between(row["pass_at_1_interval"]),
            percent(row["maj_at_k"] if row["k"] > 1 and row["domain"] != "code" else None), percent(row["truncated"]),
            "-" if length is None else f"{length:.0f}", *(percent(row["published"].get(model)) for model in models),
        )  # fmt: skip
    return grid
