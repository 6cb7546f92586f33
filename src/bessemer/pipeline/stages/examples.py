"""Stage "examples": worked examples of tasks, as conversations for a cold start (R1 2.3.1).

R1 has its cold-start data written by prompting a model with examples, and by people. A model from elsewhere that does
not know the form at all, and so would never be paid by RL, gets its first examples from the tasks' own pages: right
answers in the right form, of train problems only. Output: samples.jsonl, one conversation a line.
"""

from collections import Counter
from itertools import count
from typing import Any

from bessemer import tasks
from bessemer.config.data import ExamplesConfig
from bessemer.data.chat import exchange
from bessemer.errors import UserError
from bessemer.pipeline.stage import Stage, register
from bessemer.runs import conversations
from bessemer.runs.context import StageContext

PATIENCE = 50
"""Pages read per example wanted, at most; a third of those of arithmetic are right and well formed."""


@register
class Examples(Stage):
    kind = "examples"
    uses_model = False

    config = ExamplesConfig

    def resolve(self, settings: ExamplesConfig, recipe: Any) -> dict[str, Any]:
        if not settings.tasks:
            raise UserError(f'stage "{settings.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in settings.tasks:
            tasks.get(name).written(0)  # UserError for a task without documents
        return {}

    def leaves_conversations(self, settings: ExamplesConfig) -> bool:
        return True

    def run(self, settings: ExamplesConfig, ctx: StageContext) -> dict[str, Any]:
        ctx.rewind(-1)
        families = [tasks.get(name) for name in settings.tasks]
        kept: dict[str, None] = {}
        passed_over: Counter[str] = Counter()
        for n in count():
            if len(kept) == settings.examples:
                break
            if n == PATIENCE * settings.examples:
                told = ", ".join(f"{reason} {times}" for reason, times in passed_over.most_common())
                raise UserError(f'stage "{ctx.name}": only {len(kept)} of {n} pages are of use ({told}); ask for fewer')
            task = families[n % len(families)]
            page = task.written(n // len(families), ctx.seed)
            verdict = task.verify(page.problem, page.response)
            line = conversations.line(exchange(page.problem.prompt, page.response))
            if verdict.correct and line not in kept:
                kept[line] = None
            else:
                passed_over["duplicate" if verdict.correct else verdict.reason] += 1
        conversations.write(ctx.dir, kept)
        return {"kept": len(kept), **dict(passed_over.most_common())}
