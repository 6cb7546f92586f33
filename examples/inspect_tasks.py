"""Bessemer's tasks in inspect-ai (`pip install 'bessemer[inspect]'`): its problems, and its verifiers as the scorer.

    bessemer serve runs/tiny
    BESSEMER_BASE_URL=http://127.0.0.1:8000/v1 BESSEMER_API_KEY=none \\
      inspect eval examples/inspect_tasks.py --model openai-api/bessemer/zero -T task=countdown -T language=zh

Any task of docs/tasks.md whose answers a rule verifies will do, such as `jsonl:PATH`; so will any model that inspect-ai
reaches.
"""

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ContentReasoning, ContentText, ModelOutput
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from bessemer import tasks
from bessemer.errors import UserError


@task(name="bessemer")
def verified(task: str = "countdown", problems: int = 100, language: str | None = None) -> Task:
    """The first problems of the test split, the same as those of `bessemer eval`."""
    source = tasks.get(task, languages=language and [language])
    if source.judged_by:
        raise UserError(f"task {task!r} needs a reward model; take one whose answers a rule verifies")
    asked = [source.problem("test", index) for index in range(min(problems, source.size("test") or problems))]
    samples = [Sample(one.prompt, id=one.id, metadata={"index": index}) for index, one in enumerate(asked)]
    return Task(samples, solver=generate(), scorer=verifier(task, language))


@scorer(metrics=[accuracy(), stderr()])
def verifier(task: str, language: str | None) -> Scorer:
    """Correct if the task's verifier says so; the explanation is its reason, such as `wrong-value` or `unclosed`."""
    source = tasks.get(task, languages=language and [language])

    async def score(state: TaskState, target: Target) -> Score:
        problem = source.problem("test", state.metadata["index"])
        verdict = await anyio.to_thread.run_sync(source.verify, problem, whole(state.output))  # code runs for a while
        return Score(
            value=CORRECT if verdict.correct else INCORRECT,
            answer=verdict.answer,
            explanation=verdict.reason,
            metadata={"formatted": verdict.formatted},
        )

    return score


def whole(output: ModelOutput) -> str:
    """The completion with the thoughts that the server returns apart; if it ended within them, they stay open."""
    parts = output.message.content
    if isinstance(parts, str):
        return parts
    thoughts = "".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
    text = "".join(part.text for part in parts if isinstance(part, ContentText))
    if not thoughts:
        return text
    if not text and output.stop_reason == "max_tokens":
        return f"<think>\n{thoughts}"
    return f"<think>\n{thoughts}\n</think>\n\n{text}"
