"""Stage "reject": rejection sampling of conversations for SFT from a model's own correct answers (R1 2.3.1 and 2.3.3).

It samples several answers per training problem and keeps the correct and readable ones (`tasks/readable.py`) that
end before the cap, without duplicates. Rules decide which are correct; if a problem has only a reference answer, a
model does (`judge.py`). Output: samples.jsonl, one conversation per line; the summary counts the dropped answers by
reason.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.addons.r1.judge import Judge
from bessemer.addons.r1.judge_api import api_key
from bessemer.addons.r1.tables import RejectConfig
from bessemer.addons.tasks.general import UNJUDGED, General
from bessemer.addons.tasks.readable import ReadabilityLimits, readable
from bessemer.addons.tasks.worked import in_r1_form
from bessemer.config.recipe import Recipe
from bessemer.data import sft_rows, sources
from bessemer.data.chat import Message, exchange, question_ids
from bessemer.data.documents import HUB, Document
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import LOADED, StageWork, answers
from bessemer.rl import rollout
from bessemer.rl.sampler import answering, facts_of_answers
from bessemer.runs import files
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.tasks.answer import summary
from bessemer.tasks.base import CORRECT, WRONG_VALUE
from bessemer.train import setup

LOOKED_AT = 256
"""Problems that are searched for a reference answer before anything runs, if there is a judge."""
BATCH = 64
"""Problems sampled together; a kill costs at most one batch."""
KEPT = 0.6
"""Share of the answers that it may keep which the stage keeps, about."""


class Reject(Stage[RejectConfig]):
    def resolve(self, config: RejectConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.tasks:
            raise UserError(f'stage "{config.name}": tasks is empty; known: {", ".join(tasks.names())}')
        preflight.refuse_environments(config.name, config.tasks, "this stage keeps single answers; choose other tasks")
        families, seed = [tasks.get(name) for name in config.tasks], recipe.seed_of(config)
        if config.judge is not None:
            first = rollout.problems_of(families, "train", config.first_problem, min(config.problems, LOOKED_AT), seed)
            if not any(_reference(problem) for _, problem in first):
                raise UserError(f'stage "{config.name}": judge has no effect: no problem has a reference answer')
            api_key(config.name, config.judge)
        if config.others_data and not config.others:
            raise UserError(f'stage "{config.name}": others_data has no effect while others is 0')
        return facts_of_answers(config)

    def probes(self, config: RejectConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield from preflight.task_probes(config.tasks, config.problems)
        yield from preflight.length_probes(config, recipe, [config.source], "max_new_tokens", config.max_new_tokens)

        def others() -> str:
            if any(spec.startswith(HUB) for spec in config.others_data):
                return ", ".join(config.others_data)  # not downloaded to be counted
            available = sft_rows.count(_conversations(config, cache))
            if available < config.others:
                raise UserError(
                    f'stage "{config.name}": others is {config.others:,}, {", ".join(config.others_data)} hold only '
                    f"{available:,} conversations; lower others, or give more"
                )
            return f"{', '.join(config.others_data)}: {available:,} conversations, {config.others:,} asked for"

        for spec in config.others_data:
            if spec.startswith(HUB):
                yield preflight.of_key("others_data", partial(sources.check, spec))
        if config.others_data:
            yield preflight.of_key("others_data", others)

    def exports_conversations(self, config: RejectConfig) -> bool:
        return True

    def exported_tokens(self, config: RejectConfig) -> float:
        return answers(config.problems * config.keep, config.max_new_tokens) * KEPT

    def work(self, config: RejectConfig, recipe: Recipe) -> list[StageWork]:
        written = answers(config.problems * config.samples, config.max_new_tokens)
        return [StageWork(config.name, sampled=written, bytes=LOADED)]

    def training_data(
        self, config: RejectConfig, recipe: Recipe, folder: Path, cache: Path
    ) -> Iterator[tasks.Problem | str]:
        """The conversations, and the problems they answer."""
        yield from super().training_data(config, recipe, folder, cache)
        families, seed = [tasks.get(name) for name in config.tasks], recipe.seed_of(config)
        problems = rollout.problems_of(families, "train", config.first_problem, config.problems, seed)
        yield from (problem for _, problem in problems)

    def run(self, config: RejectConfig, ctx: StageContext) -> dict[str, Any]:
        if ctx.source is None or not (ctx.source / "model").is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        setup.keep_memory()
        with answering(ctx.source / "model", ctx, config) as engine:
            lots = self._sample(config, ctx, engine)
        return self._finish(config, ctx, lots)

    def _sample(self, config: RejectConfig, ctx: StageContext, engine: Any) -> list[Path]:
        """The files of the lots, each a batch of problems with the answers that are kept."""
        engine.tokenizer.use_template(config.prompt_template)
        families = [tasks.get(name) for name in config.tasks]
        judge = None if config.judge is None else Judge(config.judge, ctx)

        def encode(problem: tasks.Problem) -> list[int]:
            return question_ids(engine.tokenizer, problem.prompt)

        firsts = range(0, config.problems, BATCH)
        finished = [path for first in firsts if (path := ctx.state / f"lot-{first:08d}.json").exists()]
        ctx.rewind(-1)
        ctx.progress.total(config.problems, "problems", done=min(config.problems, len(finished) * BATCH))
        for first in firsts[len(finished) :]:
            count = min(BATCH, config.problems - first)
            chosen = rollout.problems_of(families, "train", config.first_problem + first, count, ctx.seed)
            groups = rollout.sample(
                engine, chosen, encode, samples=config.samples,
                seed=tasks.stable_hash(ctx.seed, ctx.name, first), temperature=config.temperature,
                max_new_tokens=config.max_new_tokens, batch_rows=setup.batch_rows(count * config.samples),
            )  # fmt: skip
            if judge is not None:
                judge_answers(judge, groups, config)
            kept, dropped = select(groups, config)
            write_atomic(ctx.state / f"lot-{first:08d}.json", json.dumps({"kept": kept, "dropped": dropped}))
            ctx.progress.advance(count, f"{len(kept)} kept of {count * config.samples}")
            if ctx.stop:
                ctx.interrupt()
        return [ctx.state / f"lot-{first:08d}.json" for first in firsts]

    def _finish(self, config: RejectConfig, ctx: StageContext, paths: list[Path]) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        kept = distinct(paths, dropped)
        if (first := next(kept, None)) is None:
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
            raise UserError(
                f'stage "{ctx.name}": none of {config.problems * config.samples} answers was kept ({reasons}). Start '
                "from a better model, take more samples, or loosen consistency and repeated"
            )
        others = map(files.conversation_line, _others(config, ctx))
        written = Counter[str]()
        files.write_conversations(ctx.dir, chain(_counted(chain([first], kept), written), others))
        counts = {"kept": written["kept"], "others": config.others}
        counts |= {name: count for name, count in dropped.most_common() if count}
        ctx.metrics.write(config.problems, 0, {f"reject/{name}": count for name, count in counts.items()})
        return counts


def distinct(lots: Sequence[Path], dropped: Counter[str]) -> Iterator[str]:
    """The conversations of all lots as lines, each once; one lot is in memory at a time. Adds the answers that were
    dropped, by reason."""
    seen: set[bytes] = set()
    for path in lots:
        lot = json.loads(path.read_text())
        dropped.update(lot["dropped"])
        for messages in lot["kept"]:
            line = files.conversation_line(messages)
            digest = blake2b(line.encode(errors="surrogatepass"), digest_size=16).digest()
            if digest in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(digest)
                yield line


def _counted(lines: Iterable[str], written: Counter[str]) -> Iterator[str]:
    for line in lines:
        written["kept"] += 1
        yield line


def _others(config: RejectConfig, ctx: StageContext) -> Iterator[Sequence[Message]]:
    """R1's share of V3's data: good answers to everyday requests, with thoughts where they help."""
    if config.others_data:
        documents = islice(_conversations(config, ctx.cache), config.others)
        return (sft_rows.checked(document, f"a conversation of {document.domain}") for document in documents)
    task = tasks.get("general")
    assert isinstance(task, General)
    return (task.conversation(index, ctx.seed) for index in range(config.others))


def _conversations(config: RejectConfig, cache: Path) -> Iterator[Document]:
    return chain.from_iterable(sources.documents(spec, cache, domain=spec) for spec in config.others_data)


def select(
    groups: list[list[rollout.ScoredSample]], config: RejectConfig
) -> tuple[list[list[Message]], dict[str, int]]:
    """Conversations to keep, and the number of dropped answers by reason."""
    kept: list[list[Message]] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        texts: list[str] = []
        for row in group:
            content = written(row, config.form)
            reason = fault(row, config) or (
                "duplicate" if content in texts else "surplus" if len(texts) == config.keep else None
            )
            if reason:
                dropped[reason] += 1
                continue
            texts.append(content)
            kept.append(exchange(row.problem.prompt, content))
    return kept, dict(dropped)


def fault(row: rollout.ScoredSample, config: RejectConfig) -> str | None:
    """The reason to drop an answer, or None."""
    if row.completion.finish_reason == "length":
        return "cut"
    if config.answers != "all" and row.verdict.reason == UNJUDGED:
        return UNJUDGED
    if config.answers == "wrong" and row.verdict.correct:  # unreadable ones count as right where a model judges
        return _unreadable(row, config) or "right"
    if config.answers == "right" and not row.verdict.correct:
        return "wrong"
    if config.answers == "right" and not row.verdict.sound:
        return "malformed"
    return _unreadable(row, config)


def _unreadable(row: rollout.ScoredSample, config: RejectConfig) -> str | None:
    limits = ReadabilityLimits(config.consistency, config.repeated, config.paragraph)
    reading = readable(row.answer, row.problem.language, limits)
    return None if reading.readable else reading.reason


def _reference(problem: tasks.Problem) -> str | None:
    """The answer that a model may judge by."""
    reference = problem.meta.get("reference")
    return reference if isinstance(reference, str) else None


def judge_answers(judge: Judge, groups: list[list[rollout.ScoredSample]], config: RejectConfig) -> None:
    """Replaces the verdicts on answers to problems with a reference answer. Only answers that could be kept are
    judged, by what follows their thoughts."""
    pairs: list[tuple[rollout.ScoredSample, tuple[str, str, str]]] = []
    for row in (row for group in groups for row in group):
        reference, answer = _reference(row.problem), summary(row.answer)
        if reference is not None and answer and row.completion.finish_reason != "length":
            if _unreadable(row, config) is None:
                pairs.append((row, (row.problem.prompt, reference, answer)))
            else:  # `fault` names what is wrong with it
                row.verdict = replace(row.verdict, correct=True, reason=CORRECT)
    for (row, _), right in zip(pairs, judge.verdicts([texts for _, texts in pairs]), strict=True):
        reason = UNJUDGED if right is None else CORRECT if right else WRONG_VALUE
        row.verdict = replace(row.verdict, correct=bool(right), reason=reason)


def written(row: rollout.ScoredSample, form: str) -> str:
    """The assistant's turn. In form "r1" the summary is the model's own if it wrote more than the tagged answer."""
    return row.answer if form == "as-is" else in_r1_form(row.problem, row.answer)
