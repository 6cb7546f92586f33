"""Stage "examples": worked examples of tasks, as conversations for a cold start (R1 2.3.1).

R1's cold-start data come from a model prompted with examples, and from human annotators. An imported model that does
not know the format would never earn a reward in RL, so its first examples come from the tasks' own pages: right answers
in the right format, to training problems only. Output: samples.jsonl, one conversation per line, with its calls.
"""

from collections import Counter
from itertools import count
from typing import Any

from bessemer import tasks
from bessemer.addons.r1.tables import ExamplesConfig
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline.stage import Stage
from bessemer.pipeline.work import StageWork
from bessemer.runs import files
from bessemer.runs.context import StageContext

PATIENCE = 50
"""Maximum pages read per example; a third of those of arithmetic are right and well formed."""


class Examples(Stage[ExamplesConfig]):
    uses_model = False

    def resolve(self, config: ExamplesConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.tasks:
            raise UserError(f'stage "{config.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in config.tasks:
            tasks.get(name).written(0)  # UserError for a task without documents
        return {}

    def work(self, config: ExamplesConfig, recipe: Recipe) -> list[StageWork]:
        return [StageWork(seconds=0.5 + config.examples / 1000)]

    def exports_conversations(self, config: ExamplesConfig) -> bool:
        return True

    def exported_tokens(self, config: ExamplesConfig) -> float:
        return 100.0 * config.examples

    def run(self, config: ExamplesConfig, ctx: StageContext) -> dict[str, Any]:
        ctx.rewind(-1)
        families = [tasks.get(name) for name in config.tasks]
        lines: dict[str, None] = {}
        rejected: Counter[str] = Counter()
        for n in count():
            if len(lines) == config.examples:
                break
            if n == PATIENCE * config.examples:
                counts = ", ".join(f"{reason} {times}" for reason, times in rejected.most_common())
                raise UserError(
                    f'stage "{ctx.name}": only {len(lines)} of {n} pages are usable ({counts}); ask for fewer'
                )
            task = families[n % len(families)]
            page = task.written(n // len(families), ctx.seed)
            verdict = task.verify(page.problem, page.response)
            line = files.conversation_line(page.messages, task.schemas)
            # The last of several turns need not think again.
            usable = verdict.correct if page.several_turns else verdict.sound
            if usable and line not in lines:
                lines[line] = None
            else:
                rejected["duplicate" if usable else verdict.reason] += 1
        files.write_conversations(ctx.dir, lines)
        return {"kept": len(lines), **dict(rejected.most_common())}
