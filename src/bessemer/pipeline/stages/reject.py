"""Stage "reject": rejection sampling, conversations for SFT from a model's own correct answers (R1 2.3.1 and 2.3.3).

Several answers per training problem; kept are correct ones that a person can read (`tasks/readability.py`), ended
before the cap, each only once. Output: samples.jsonl, one conversation a line; the summary says what was dropped for
what.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.data import RejectConfig
from bessemer.data.chat import exchange, question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.pipeline.stage import Stage, register
from bessemer.rl import rollout
from bessemer.runs import conversations
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.readability import ReadabilityLimits, readable
from bessemer.train import setup

SUMMARY = {"en": "The answer is <answer>{answer}</answer>.", "zh": "答案是<answer>{answer}</answer>。"}
"""What follows the thoughts in R1's form: a sentence in the language of the question."""
LOT = 64
"""Problems sampled together; a kill costs at most one lot."""


@register
class Reject(Stage):
    kind = "reject"

    config = RejectConfig

    def resolve(self, settings: RejectConfig, recipe: Any) -> dict[str, Any]:
        if not settings.tasks:
            raise UserError(f'stage "{settings.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in settings.tasks:
            tasks.get(name)
        return {}

    def leaves_conversations(self, settings: RejectConfig) -> bool:
        return True

    def estimate(self, settings: RejectConfig, recipe: Any) -> float:
        return setup.decode_seconds(recipe, settings.problems * settings.samples * settings.max_new_tokens)

    def shown(self, settings: RejectConfig, recipe: Any, folder: Path, cache: Path) -> Iterator[tasks.Problem | str]:
        """The conversations, and the problems they answer."""
        yield from super().shown(settings, recipe, folder, cache)
        families, seed = [tasks.get(name) for name in settings.tasks], recipe.seed_of(settings)
        asked = rollout.problems_of(families, "train", settings.first_problem, settings.problems, seed)
        yield from (problem for _, problem in asked)

    def run(self, settings: RejectConfig, ctx: StageContext) -> dict[str, Any]:
        if ctx.source is None or not (ctx.source / "model").is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        setup.keep_memory()
        engine = Engine(*setup.load_model(ctx.source / "model"), setup.workers())
        families = [tasks.get(name) for name in settings.tasks]

        def encode(problem: tasks.Problem) -> list[int]:
            return question_ids(engine.tokenizer, problem.prompt)

        lots = range(0, settings.problems, LOT)
        found = [path for first in lots if (path := ctx.state / f"lot-{first:08d}.json").exists()]
        ctx.rewind(-1)
        ctx.progress.total(settings.problems, "problems", done=min(settings.problems, len(found) * LOT))
        for first in lots[len(found) :]:
            count = min(LOT, settings.problems - first)
            chosen = rollout.problems_of(families, "train", settings.first_problem + first, count, ctx.seed)
            groups = rollout.sample(
                engine, chosen, encode, samples=settings.samples,
                seed=tasks.stable_hash(ctx.seed, ctx.name, first), temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens, batch_rows=setup.batch_rows(count * settings.samples),
            )  # fmt: skip
            kept, dropped = select(groups, settings)
            write_atomic(ctx.state / f"lot-{first:08d}.json", json.dumps({"kept": kept, "dropped": dropped}))
            ctx.progress.advance(count, f"{len(kept)} kept of {count * settings.samples}")
            if ctx.stop:
                ctx.interrupt()
        return self._finish(settings, ctx, [ctx.state / f"lot-{first:08d}.json" for first in lots])

    def _finish(self, settings: RejectConfig, ctx: StageContext, lots: list) -> dict[str, Any]:
        kept, dropped = {}, Counter()
        for path in lots:
            lot = json.loads(path.read_text())
            dropped.update(lot["dropped"])
            for messages in lot["kept"]:
                line = conversations.line(messages)
                dropped["duplicate"] += line in kept
                kept[line] = None
        if not kept:
            told = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
            raise UserError(
                f'stage "{ctx.name}": none of {settings.problems * settings.samples} answers was kept ({told}). Start '
                "from a better model, take more samples, or loosen consistency and repeated"
            )
        others = [conversations.line(messages) for messages in _others(settings, ctx.seed)]
        conversations.write(ctx.dir, [*kept, *others])
        counts = {"kept": len(kept), "others": len(others)}
        counts |= {name: count for name, count in dropped.most_common() if count}
        ctx.metrics.write(settings.problems, 0, {f"reject/{name}": count for name, count in counts.items()})
        return counts


def _others(settings: RejectConfig, seed: int) -> Iterator[list[dict[str, str]]]:
    """What R1 takes from V3's data: kind answers to everyday requests, with thoughts where they help."""
    task = tasks.get("general")
    return (task.conversation(index, seed) for index in range(settings.others))


def select(groups: list[list[rollout.ScoredSample]], settings: RejectConfig) -> tuple[list[Any], dict[str, int]]:
    """Conversations to keep, and how many answers were dropped for what."""
    kept, dropped = [], Counter()
    for group in groups:
        taken: list[str] = []
        for row in group:
            content = written(row, settings.form)
            reason = fault(row, settings) or (
                "duplicate" if content in taken else "surplus" if len(taken) == settings.keep else None
            )
            if reason:
                dropped[reason] += 1
                continue
            taken.append(content)
            kept.append(exchange(row.problem.prompt, content))
    return kept, dict(dropped)


def fault(row: rollout.ScoredSample, settings: RejectConfig) -> str | None:
    """Why an answer is not to be learnt from."""
    if row.completion.finish_reason == "length":
        return "cut"
    if not row.verdict.correct:
        return "wrong"
    limits = ReadabilityLimits(settings.consistency, settings.repeated, settings.paragraph)
    reading = readable(row.answer, row.problem.language, limits)
    return None if reading.readable else reading.reason


def written(row: rollout.ScoredSample, form: str) -> str:
    """The assistant's turn."""
    reply = parse_reply(row.answer)
    if form == "as-is" or reply.answer is None:
        return row.answer
    return f"<think>\n{(reply.think or '').strip()}\n</think>\n\n" + SUMMARY[row.problem.language].format(
        answer=reply.answer.strip()
    )
