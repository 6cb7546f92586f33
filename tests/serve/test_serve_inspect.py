"""`examples/inspect_tasks.py`: inspect-ai puts our problems to our server, and our verifiers judge the answers."""

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed: pip install -e '.[inspect]'")
from inspect_ai import eval as evaluated
from inspect_ai.model import ContentReasoning, ContentText, ModelOutput, get_model
from inspect_ai.scorer import Target
from inspect_ai.solver import TaskState

from bessemer import tasks
from bessemer.data.chat import render_ids
from bessemer.errors import UserError

SOURCE = Path(__file__).parents[2] / "examples" / "inspect_tasks.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("inspect_tasks", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged(example, text, thoughts=None, stop="stop"):
    """The score of an answer to the first arithmetic problem."""
    output = ModelOutput.from_content("bessemer/zero", text, stop_reason=stop)
    if thoughts is not None:
        output.message.content = [ContentReasoning(reasoning=thoughts), ContentText(text=text)]
    state = TaskState("bessemer/zero", 0, 1, "", [], output=output, metadata={"index": 0})
    score = asyncio.run(example.verifier("arithmetic", "en")(state, Target("")))
    return score.value, score.explanation


def test_answers_get_the_verdicts_of_the_task(example):
    """Thoughts in the text or separate, right and wrong answers, and one cut off inside its thoughts."""
    value = tasks.get("arithmetic", languages=["en"]).problem("test", 0).meta["value"]
    right, wrong = f"<answer>{value}</answer>", f"<answer>{value + 1}</answer>"
    assert judged(example, f"<think>so</think>{right}") == judged(example, right, "so") == ("C", "correct")
    assert judged(example, f"<think>so</think>{wrong}") == judged(example, wrong, "so") == ("I", "wrong-value")
    assert judged(example, "", right, stop="max_tokens") == ("I", "unclosed")
    assert judged(example, str(value)) == ("I", "no-answer")


def test_a_served_model_is_asked_and_judged(example, server, engine, tmp_path):
    """Its greedy answers are the engine's, thoughts included, and every answer has a verdict."""
    model = get_model("openai-api/bessemer/r1", base_url=f"{server.url}/v1", api_key="none", memoize=False)
    settings = dict(display="none", log_dir=str(tmp_path), temperature=0.0, max_tokens=24)
    (log,) = evaluated(example.verified("countdown", 6), model, **settings)
    assert log.status == "success", log.error
    task, form = tasks.get("countdown"), re.compile(r"</?(?:think|answer)>|\s")
    for index, sample in enumerate(log.samples):
        problem = task.problem("test", index)
        ids = render_ids(engine.tokenizer, [{"role": "user", "content": problem.prompt}])
        (answer,) = engine.generate([ids], temperature=0, max_new_tokens=24)[0]
        whole = example.whole(sample.output)
        assert sample.id == problem.id and form.sub("", whole) == form.sub("", answer.text)
        assert sample.scores["verifier"].explanation == task.verify(problem, whole).reason


def test_a_task_that_no_rule_judges(example, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "Name a colour."}\n')
    with pytest.raises(UserError, match=f"'general:{tmp_path}' needs a reward model"):
        example.verified(f"general:{tmp_path}")
