"""Which problems a rollout asks, which samples it draws, and how they are laid out in batches."""

from dataclasses import replace

import pytest
import torch
from completions import completion
from rl_parts import reward, to_batches

from bessemer import tasks
from bessemer.data.chat import jinja, render_ids
from bessemer.rl import rollout
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Verdict

TASKS = [tasks.get("countdown"), tasks.get("arithmetic")]
PAD = 2


def row(prompt, answer, advantage=0.0, logprobs=None):
    logprobs = [-0.5] * len(answer) if logprobs is None else logprobs
    answered = completion(answer, "", logprobs, "stop", len(prompt))
    return ScoredSample(TASKS[0].problem("train", 0), prompt, answered, Verdict(True, True, "", None), 1.0, advantage)


def some_rows(count=17, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 99, (length,), generator=generator).tolist()

    rows = []
    for number in range(count):
        prompt, answer = ids(1, 9), ids(1, 14)
        rows.append(row(prompt, answer, 0.25 * number - 1, (-torch.rand(len(answer), generator=generator)).tolist()))
    return rows


def test_problems_take_the_tasks_in_turn_and_follow_from_their_number():
    actual = rollout.problems_of(TASKS, "train", 5, 6, seed=3)
    assert [(task.name, problem.id) for task, problem in actual] == [
        (TASKS[n % 2].name, TASKS[n % 2].problem("train", n // 2, 3).id) for n in range(5, 11)
    ]
    assert actual == rollout.problems_of(TASKS, "train", 5, 6, seed=3)
    assert actual[2:] == rollout.problems_of(TASKS, "train", 7, 4, seed=3), "rollouts are windows of one endless list"
    assert [p.prompt for _, p in actual] != [p.prompt for _, p in rollout.problems_of(TASKS, "train", 5, 6, seed=4)]
    assert all("/train/" in problem.id for _, problem in actual)
    assert all("/test/" in problem.id for _, problem in rollout.problems_of(TASKS, "test", 0, 2, seed=3))


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_a_batch_holds_every_token_where_it_belongs(normalise):
    rows = some_rows()
    lines = []
    for batch in to_batches(rows, PAD, 60, normalise):
        for b in range(batch.n_rows):
            lines.append([values[b].tolist() for values in (batch.tokens_BT, batch.loss_BT, *batch.extras.values())])
            assert list(batch.extras) == ["advantage_BT", "old_logp_BT"]
    expected = []
    for sample in rows:
        n_prompt, n_answer = len(sample.prompt_tokens), len(sample.completion.tokens)
        weight = 1 / n_answer if normalise == "sequence" else 1.0
        expected.append((
            [*sample.prompt_tokens, *sample.completion.tokens],
            [0.0] * n_prompt + [weight] * n_answer,
            [0.0] * n_prompt + [sample.advantage] * n_answer,
            [*([0.0] * n_prompt), *sample.completion.logprobs],
        ))  # fmt: skip
    for line in lines:
        match = [
            want for want in expected if line[0][: len(want[0])] == want[0] and set(line[0][len(want[0]) :]) <= {PAD}
        ]
        assert len(match) == 1
        length = len(match[0][0])
        for actual, want in zip(line[1:], match[0][1:], strict=True):
            assert actual[:length] == pytest.approx(want) and not any(actual[length:]), "padding carries nothing"
        expected.remove(match[0])
    assert not expected, "every row once"


def test_a_task_named_twice_has_two_turns_and_never_the_same_problem():
    listed = [TASKS[0], TASKS[1], TASKS[0]]
    found = rollout.problems_of(listed, "train", 0, 9, seed=3)
    ids = [problem.id for _, problem in found]
    assert len(set(ids)) == 9
    assert [task.name for task, _ in found] == ["countdown", "arithmetic", "countdown"] * 3
    alone = [problem.id for _, problem in rollout.problems_of(TASKS[:1], "train", 0, 6, seed=3)]
    assert [i for i in ids if i.startswith("countdown")] == alone
    assert rollout.problems_of(listed, "train", 5, 2, seed=3) == found[5:7]


@pytest.mark.parametrize("max_tokens", [60, 100, 200])
def test_parts_are_a_multiple_of_four_and_the_largest_is_as_small_as_can_be(max_tokens):
    rows = some_rows(40)
    parts = rollout.Packing(max_tokens, PAD, packs=False).parts(rows)
    lengths = sorted((len(r.prompt_tokens) + len(r.completion.tokens) for r in rows), reverse=True)

    def filled(bound):
        """The padded sizes of parts filled as far as `bound` allows."""
        sizes, start = [], 0
        while start < len(lengths):
            n = min(len(lengths) - start, max(1, bound // lengths[start]))
            sizes.append(n * lengths[start])
            start += n
        return sizes

    assert len(filled(max_tokens)) <= len(parts) < len(filled(max_tokens)) + rollout.SHARED
    assert len(parts) % rollout.SHARED == 0
    longest = [len(part[0][0].prompt_tokens) + len(part[0][0].completion.tokens) for part in parts]
    largest = max(len(part) * length for part, length in zip(parts, longest, strict=True))
    assert all(len(filled(bound)) > len(parts) for bound in range(longest[0], largest))


@pytest.mark.parametrize(
    ("max_tokens", "n_pipelines", "wanted"), [(10_000, 2, 2), (10_000, 8, 8), (200, 6, 12), (1, 64, 40)]
)
def test_every_pipeline_has_as_many_parts_as_far_as_there_are_rows(max_tokens, n_pipelines, wanted):
    rows = some_rows(40)
    parts = rollout.Packing(max_tokens, PAD, n_pipelines=n_pipelines, packs=False).parts(rows)
    assert len(parts) == wanted and sum(map(len, parts)) == len(rows)
    assert rollout.Packing(max_tokens, PAD, n_pipelines=n_pipelines).parts([]) == []


def test_rows_for_a_gpu_have_few_lengths(monkeypatch):
    """The tokens and loss weights are the same, padded up to a multiple of BUCKET."""
    rows = some_rows()
    plain = to_batches(rows, PAD, 10_000, "token")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    padded = to_batches(rows, PAD, 10_000, "token")[0]
    width = plain.tokens_BT.shape[1]
    assert padded.tokens_BT.shape[1] % rollout.BUCKET == 0 and 0 <= padded.tokens_BT.shape[1] - width < rollout.BUCKET
    assert torch.equal(padded.tokens_BT[:, :width], plain.tokens_BT) and (padded.tokens_BT[:, width:] == PAD).all()
    assert torch.equal(padded.loss_BT[:, :width], plain.loss_BT) and not padded.loss_BT[:, width:].any()


def test_rewards_keep_prompts_and_samples_apart():
    groups = [[row([1], [5]) for _ in range(3)] for _ in range(2)]
    groups[1][2].reward = 0.25
    assert rollout.rewards(groups).tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.25]]


@pytest.fixture
def draw(engine, tokenizer):
    def encode(problem):
        return render_ids(tokenizer, [{"role": "user", "content": problem.prompt}])

    def draw(seed=1, first=0, count=3, task_list=TASKS[1:], samples=3, **options):
        chosen = rollout.problems_of(task_list, "train", first, count, seed=0)
        options = dict(temperature=1.0, max_new_tokens=12) | options
        return rollout.sample(engine, chosen, encode, samples=samples, seed=seed, **options)

    return draw


def written(groups):
    return [[list(sampled.completion.tokens) for sampled in group] for group in groups]


def test_samples_follow_from_seed_prompt_and_number_alone(draw):
    first = written(draw())
    assert first == written(draw())
    assert first[:2] == written(draw(count=2)), "whatever else is in the rollout"
    assert [group[:2] for group in first] == written(draw(samples=2)), "and however many samples there are"
    assert first == written(draw(batch_rows=2))
    assert first != written(draw(seed=2))
    texts = [tuple(tokens) for group in first for tokens in group]
    assert len(set(texts)) == len(texts), "nine different samples"


def test_a_problem_that_comes_twice_is_sampled_twice(engine, draw):
    once = TASKS[1].problem("train", 0)
    chosen = [(TASKS[1], once)] * 2
    one, two = rollout.sample(engine, chosen, lambda p: [0, 5, 6], samples=2, seed=1, max_new_tokens=12)
    assert written([one]) != written([two])


def test_what_the_template_wrote_of_the_answer_is_judged_with_it(engine, tokenizer, monkeypatch):
    """R1's prompt ends in `<think>`: without it no answer would be well-formed."""
    heard = []
    verify = lambda self, problem, text: heard.append(text) or Verdict(False, False, "", None)  # noqa: E731
    monkeypatch.setattr(tasks.Task, "verify", verify)
    monkeypatch.setattr(tokenizer, "chat_template", jinja("r1"))
    chosen = [(TASKS[1], TASKS[1].problem("train", 0))]
    ((sampled,),) = rollout.sample(engine, chosen, lambda p: [0, 5], samples=1, seed=1, max_new_tokens=2)
    assert heard == [sampled.answer] == ["<think>\n" + sampled.completion.text]


def group_of(engine, monkeypatch, *texts):
    """Samples of one English question with these texts as answers."""
    verify = lambda self, problem, text: Verdict(False, False, "", None)  # noqa: E731
    monkeypatch.setattr(tasks.Task, "verify", verify)
    generate, left = type(engine).generate, iter(texts)

    def told(self, *args, **options):
        groups = generate(self, *args, **options)
        return [[replace(completion, text=next(left)) for completion in group] for group in groups]

    monkeypatch.setattr(type(engine), "generate", told)
    english = [(TASKS[1], TASKS[1].problem("train", 0, language="en"))]
    return rollout.sample(engine, english, lambda p: [0, 5], samples=len(texts), seed=1, max_new_tokens=2)


def test_a_summary_in_another_language_costs_only_where_the_reply_is_judged(engine, monkeypatch):
    texts = "<think>low</think> done", "<think>low</think> 好", "<think>小</think> done"
    (group,) = group_of(engine, monkeypatch, *texts)
    for scope, paid in (("thoughts", [1.0, 1.0, 0.0]), ("reply", [1.0, 0.0, 0.0])):
        reward({"name": "language", "scope": scope}).score([group])
        assert [sampled.reward for sampled in group] == paid


def test_with_needs_format_a_right_answer_in_broken_tags_counts_as_wrong():
    task, problem = tasks.get("words"), tasks.Problem("p", "...", "en", {"value": 7})
    texts = ["<think>t</think><answer>7</answer>", "<answer>7</answer>", "<answer>8</answer>"]
    made = [completion([1], text) for text in texts]
    for needs_format, expected in ((False, [True, True, False]), (True, [True, False, False])):
        (group,) = rollout.verify([(task, problem)], [[1]], [made], "", needs_format)
        assert [row.verdict.correct for row in group] == expected
        assert [row.verdict.reason for row in group] == ["correct", "no-think", "no-think"]


@pytest.mark.parametrize("begun", ["", "<think>\n"])
def test_with_needs_format_nothing_is_paid_that_stands_around_the_blocks(begun):
    """A template that opens the thoughts expects R1's summary; one that does not expects R1-Zero's blocks."""
    task, problem = tasks.get("words"), tasks.Problem("p", "...", "en", {"value": 7})
    thoughts = "<think>\nt\n</think>".removeprefix(begun)
    blocks = ["<answer>7</answer>", "\n<answer>\n7\n</answer>\n"]
    summaries = ["\n\nSo it is \\boxed{7}.", "\n\n<answer>7</answer>\n\nChecked."]
    never = ["\n\n\u200b<answer>7</answer>", "\n\n" + "so " * 3000 + "\\boxed{7}", "So <answer>7</answer>",
             "\n\n<answer>7</answer><!-- good -->", "<answer>7</answer>" + " " * 1000]  # fmt: skip
    texts = [*blocks, *summaries, *never]
    made = [completion([1], thoughts + text) for text in texts]
    (group,) = rollout.verify([(task, problem)], [[1]], [made], begun, True)
    paid = [row.verdict.correct for row in group]
    assert paid == [True, True] + [begun != ""] * 2 + [False] * len(never)
    assert [row.verdict.reason for row in group] == ["correct" if one else "text-around" for one in paid]
    (group,) = rollout.verify([(task, problem)], [[1]], [made], begun, False)
    assert all(row.verdict.correct for row in group), "accuracy is a term of its own"
