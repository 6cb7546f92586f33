"""Multi-turn episodes with the real engine, network and tokenizer: what is generated when, who wrote which token, and
which tokens are trained on."""

import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from completions import completion
from rl_parts import assign, policy_logprobs, reward, to_batches

from bessemer import tasks
from bessemer.addons.distributed.sample_ahead import pack, unpack
from bessemer.addons.tasks import tool_texts as tools
from bessemer.addons.tasks.environment import Environment, EnvironmentFailure, Observation
from bessemer.data import chat, corpus
from bessemer.data.chat import render_ids
from bessemer.data.corpus import Augment
from bessemer.data.documents import Document
from bessemer.data.encoder import Encoder
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.answers import PlayedEpisode, played
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.rl import rollout
from bessemer.rl.losses import GRPO
from bessemer.rl.monitor import rollout_metrics
from bessemer.tasks.base import Problem, Verdict

CONTEXT = 96


def metrics_of(groups):
    sampled = rollout.Rollout(groups, n_problems=len(groups), cap=64, step=0)
    return rollout_metrics(sampled, SimpleNamespace(max_resamples=1), has_contrast=False)


class Echo(Environment):
    """Replies "go on" to two turns, then ends. A problem with "breaks" in its meta fails at the second turn."""

    name, domain, max_turns = "echo", "tools", 5

    def make(self, split, index, seed, language, phrasing):
        return Problem(f"echo/{split}/{seed}/{index}/{language}", f"question {index}", language, {})

    def reset(self, problem, seed):
        return EchoEpisode(problem)


class EchoEpisode:
    def __init__(self, problem):
        self.problem, self.texts, self.closed = problem, [], False
        self.start = [{"role": "user", "content": problem.prompt}]

    def step(self, action):
        self.texts.append(action.text)
        if self.problem.meta.get("breaks") and len(self.texts) == 2:
            raise EnvironmentFailure("the server died")
        return Observation([{"role": "user", "content": "go on"}], done=len(self.texts) > 2)

    def verdict(self, text):
        assert len(self.texts) < 3 or text == self.texts[-1]
        return Verdict(len(self.texts) % 2 == 1, True, "correct", str(len(self.texts)))

    def close(self):
        self.closed = True


class Scripted:
    """An engine whose answers come from a function (turn, prompt ids, seed) -> text. It records its calls."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.calls = tokenizer, answer, []

    def generate(self, prompts, *, samples, seeds, max_new_tokens, **options):
        self.calls.append((prompts, seeds, max_new_tokens))
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            group = []
            for k in range(samples):
                ids = [*self.written(self.answer(len(self.calls), prompt, seed + k)), self.tokenizer.eos_id]
                end = "stop" if len(ids) <= max_new_tokens else "length"
                ids = ids[:max_new_tokens]
                logp = [-0.01 * (n + 1) for n in range(len(ids))]
                group.append(completion(ids, self.tokenizer.decode(ids), logp, end, len(prompt)))
            groups.append(group)
        return groups

    def written(self, text):
        marks = self.tokenizer.tool_marks
        parts = chat.split_at_marks(text) if marks else [text]
        return [i for part in parts for i in ([marks[part]] if part in marks else self.tokenizer.encode(part))]


@pytest.fixture(scope="module")
def with_marks():
    """A tokenizer in which the markers of tool calls are tokens."""
    return Tokenizer.train(["User: Multiply 3 and 4.\nAssistant: <answer>12</answer>"] * 8, 300, tool_tokens=True)


@pytest.fixture
def often(monkeypatch):
    """A random network rarely ends a turn on its own, so here a third of all tokens ends one."""
    monkeypatch.setattr(Tokenizer, "stop_ids", property(lambda self: list(range(3, 110))))


def encode(problem):
    raise AssertionError("an environment begins its own prompt")


def echoes(count, **meta):
    task = Echo()
    return [(task, replace(task.problem("train", n, 0, "en"), meta=dict(meta))) for n in range(count)]


def play(engine, problems, samples=3, seeds=None, cap=40, context=CONTEXT, **options):
    seeds = list(range(7, 7 + len(problems))) if seeds is None else seeds
    return played(engine, problems, encode, samples=samples, seeds=seeds, cap=cap, context=context,
                  temperature=1.0, top_p=1.0, batch_rows=64, **options)  # fmt: skip


def test_a_call_is_answered_and_the_answer_is_judged(with_marks):
    def answer(turn, prompt, seed):
        return " " + tools.calls_text([call]) if turn == 1 else "<answer>12</answer>"

    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "3*4"}'}}

    task = tasks.get("products")
    problem = replace(task.problem("train", 0, language="en"), meta={"value": 12, "numbers": [3, 4]})
    engine = Scripted(with_marks, answer)
    prompts, [[actual, _]] = play(engine, [(task, problem)], samples=2, cap=200, context=500)
    assert actual.verdict.correct and actual.failure == "" and actual.completion.finish_reason == "stop"
    assert [(turn.role, turn.text) for turn in actual.turns[1:]] == [
        ("tool", "12"),
        ("assistant", "<answer>12</answer>"),
    ]
    assert sum(turn.tokens for turn in actual.turns) == len(actual.completion.tokens)
    # the ids are those of the conversation rendered as a whole
    messages = [
        {"role": "user", "content": problem.prompt},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
        {"role": "assistant", "content": "<answer>12</answer>"},
    ]
    expected = render_ids(with_marks, messages, add_generation_prompt=False)
    ours = [*prompts[0], *actual.completion.tokens]
    assert [i for i in ours if i != with_marks.encode(" ")[0]] == [
        i for i in expected if i != with_marks.encode(" ")[0]
    ]
    assert [len(call[0]) for call in engine.calls] == [1, 2], "a prompt with its samples, then every episode by itself"


def test_a_page_with_a_call_is_in_a_corpus_what_an_episode_is(with_marks):
    """The ids are the same, so pre-training shows the base exactly what RL will ask it to continue."""
    page = tasks.get("products", calls=1.0, slip=0.0, languages=["en"]).written(3)
    document = Document(page.text, "products", page.messages, spoken=True)
    encoder, augment = Encoder(with_marks), Augment(with_marks, 0.0, 0.0)
    [(_, _, ids)] = corpus.tokenise([document], encoder, 0.0, augment)
    assert ids.tolist() == render_ids(with_marks, page.messages, add_generation_prompt=False)
    assert {*with_marks.tool_marks.values()} & {*ids.tolist()} and ids.tolist().count(with_marks.eos_id) == 2
    [(_, _, plain)] = corpus.tokenise([replace(document, spoken=False)], encoder, 0.0, augment)
    assert plain.tolist() == [with_marks.bos_id, *with_marks.encode(page.text), with_marks.eos_id]


def test_seeds_follow_from_prompt_sample_and_turn(tokenizer):
    engine = Scripted(tokenizer, lambda turn, prompt, seed: f"a{seed % 1000}")
    play(engine, echoes(2), samples=2, cap=60)
    first, second, third = (seeds for _, seeds, _ in engine.calls)
    assert first == [7, 8] and len({*second, *third}) == 8, "another for every episode and turn"
    other = Scripted(tokenizer, engine.answer)
    play(other, echoes(2)[1:], samples=2, cap=60, seeds=[8])
    assert other.calls[1][1] == second[2:] and other.calls[2][1] == third[2:], "whatever else is in the call"


def test_what_the_model_wrote_and_nothing_else_is_trained_on(model, tokenizer, often):
    engine = Engine(model, tokenizer)
    problems = echoes(3)
    groups = rollout.sample(engine, problems, encode, samples=4, seed=1, max_new_tokens=60, context=CONTEXT,
                            record_routing=True, temperature=0.8)  # fmt: skip
    rows = [row for group in groups for row in group]
    assert any(len(row.turns) == 5 for row in rows) and all(row.turns[0].role == "assistant" for row in rows)
    for row in rows:
        spans, at = [], 0
        for turn in row.turns:
            spans += [turn.role == "assistant"] * turn.tokens
            at += turn.tokens
        assert at == len(row.completion.tokens) == len(row.completion.logprobs) and sum(spans) == row.length
        assert row.trained_N.tolist() == [n for n, own in enumerate(spans) if own]
        read = [p for p, own in zip(row.completion.logprobs, spans, strict=True) if not own]
        assert not any(read) and row.completion.routing.shape[0] == len(row.prompt_tokens) + at - 1
        row.advantage = 1.0
    for normalise in ("sequence", "token"):
        for batch in to_batches(rows, tokenizer.pad_id, 400, normalise):
            logp_BT = policy_logprobs(model, batch, 0.8)
            own_BT = batch.loss_BT > 0
            # the sampler's log-probabilities are the network's on the whole conversation
            torch.testing.assert_close(logp_BT[own_BT], batch.extras["old_logp_BT"][own_BT], atol=2e-4, rtol=0)
            assert not batch.extras["advantage_BT"][~own_BT].any()
            if normalise == "sequence":
                torch.testing.assert_close(batch.loss_BT.sum(1), torch.ones(batch.n_rows))
    assert sum(b.n_loss_tokens for b in to_batches(rows, 2, 400, "token")) == sum(row.length for row in rows)
    values = metrics_of(groups)
    assert values["rl/turns"] > 1 and values["rl/length"] == sum(row.length for row in rows) / len(rows)


def test_the_gradient_matches_that_of_the_same_tokens_masked_by_hand(model, tokenizer, often):
    groups = rollout.sample(Engine(model, tokenizer), echoes(2), encode, samples=2, seed=5, max_new_tokens=40,
                            context=CONTEXT)  # fmt: skip
    rows = [row for group in groups for row in group]
    for n, row in enumerate(rows):
        row.advantage = (-1.0) ** n
    [batch] = to_batches(rows, tokenizer.pad_id, 10_000, "token")
    loss = GRPO(kl=0.0)(model, batch)
    total = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt_tokens, *row.completion.tokens]])
        logp_T = model(ids)[0].log_softmax(-1)
        for position in row.trained_N.tolist():
            at = len(row.prompt_tokens) + position
            ratio = (logp_T[at - 1, ids[0, at]] - row.completion.logprobs[position]).exp()
            total = total - ratio * row.advantage
    torch.testing.assert_close(loss.total, total, atol=1e-3, rtol=1e-3)


def test_samples_do_not_depend_on_what_is_beside_them(model, tokenizer, often):
    both = play(Engine(model, tokenizer), echoes(2), cap=30)[1]
    alone = play(Engine(model, tokenizer), echoes(2)[1:], cap=30, seeds=[8])[1]
    assert [one.completion.tokens for one in both[1]] == [one.completion.tokens for one in alone[0]]
    assert len({tuple(one.completion.tokens) for one in both[1]}) == 3


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_bound_of_an_episode_cuts_it_where_its_own_call_would_have(model, tokenizer, often, top_p):
    """In each turn all episodes generate up to the largest remaining budget; shorter budgets are cut afterwards."""
    engine, options = Engine(model, tokenizer), {"record_kept": top_p < 1, "record_routing": True}

    def completions(cap):
        seeds = [3, 4, 5]
        outcome = played(engine, echoes(3), encode, samples=4, seeds=seeds, cap=cap, context=CONTEXT, temperature=1.0,
                       top_p=top_p, batch_rows=64, **options)  # fmt: skip
        return [one for group in outcome[1] for one in group]

    cut = 0
    for long, short in zip(completions(60), completions(9), strict=True):
        n, wrote = len(short.completion.tokens), sum(t.tokens for t in short.turns if t.role == "assistant")
        assert wrote <= 9 and short.completion.tokens == long.completion.tokens[:n]
        assert short.completion.routing.equal(long.completion.routing[: len(short.completion.routing)])
        cut += short.completion.finish_reason == "length" and len(short.turns) > 1
        if top_p < 1:
            kept = short.completion.kept
            assert len(kept.count_T) == n and kept.count_T.sum() == len(kept.id_M)
            assert kept.id_M.equal(long.completion.kept.id_M[: len(kept.id_M)])
    assert cut >= 2


def test_an_observation_that_does_not_fit_the_context_ends_the_episode(tokenizer):
    engine = Scripted(tokenizer, lambda turn, prompt, seed: "a b c")
    _, [[whole]] = play(engine, echoes(1), samples=1, context=10**6)
    prompts, [[short]] = play(engine, echoes(1), samples=1, context=len(whole.completion.tokens) + 4)
    assert short.completion.finish_reason == "length" and len(short.turns) < len(whole.turns) == 5
    assert short.completion.tokens == whole.completion.tokens[: len(short.completion.tokens)]
    assert short.turns[-1].role == "assistant" and len(prompts[0]) + len(short.completion.tokens) < 10**6


def test_a_start_that_does_not_fit_the_context_costs_its_own_episodes_alone(model, tokenizer):
    task = Echo()
    long = replace(task.problem("train", 1, 0, "en"), prompt="word " * 400)
    problems = [*echoes(1), (task, long)]
    prompts, [sound, failed] = play(Engine(model, tokenizer), problems, samples=2, cap=8)
    assert [one.failure for one in sound] == ["", ""] and len(prompts[1]) == 1
    assert all("leave no room in the context of 96" in one.failure and not one.verdict.correct for one in failed)


def test_environments_in_one_call_keep_their_own_widths(tokenizer):
    """One whose episodes step one at a time does not hold up those of another."""

    def play_with(parallel):
        task, most, now, lock = Echo(), [0], [0], threading.Lock()
        task.parallel = parallel

        class Slow(EchoEpisode):
            def step(self, action):
                with lock:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                time.sleep(0.05)
                with lock:
                    now[0] -= 1
                return super().step(action)

        task.reset = lambda problem, seed: Slow(problem)
        return (task, echoes(1)[0][1]), most

    (one, serial), (other, wide) = play_with(1), play_with(4)
    _, groups = play(Scripted(tokenizer, lambda *_: "yes"), [one, other, one], samples=4)
    assert (serial, wide) == ([1], [4]) and not any(each.failure for group in groups for each in group)


def test_an_environment_that_fails_costs_its_own_episodes_alone(tokenizer):
    problems = [*echoes(1), *echoes(1, breaks=True)]
    engine = Scripted(tokenizer, lambda turn, prompt, seed: "yes")
    groups = rollout.sample(engine, problems, encode, samples=2, seed=1, max_new_tokens=40, context=CONTEXT,
                            temperature=1.0, top_p=1.0, batch_rows=64)  # fmt: skip
    sound, failed = groups
    assert [row.failure for row in failed] == ["the server died"] * 2 and not any(row.failure for row in sound)
    assert failed[0].verdict.reason == "environment-failed" and len(failed[0].trained_N) == 0
    mixed, paid = [[sound[0], sound[1], failed[0]]], reward("accuracy")
    paid.score(mixed)
    sound[0].reward = 0.0
    paid.score(mixed)
    assert failed[0].reward == sum(row.reward for row in sound) / 2
    assign(mixed, "group")
    [batch] = to_batches(mixed[0], 2, 10_000, "sequence")
    assert int((batch.loss_BT.sum(1) == 0).sum()) == 1 and abs(failed[0].advantage) < 1e-5
    assert metrics_of(groups)["rl/episodes_failed"] == 2
    with pytest.raises(UserError, match=r"every episode \(the server died\); fix it"):
        play(engine, echoes(2, breaks=True))


def test_what_an_environment_gets_wrong_is_its_failure(tokenizer, monkeypatch):
    engine = Scripted(tokenizer, lambda turn, prompt, seed: "yes")

    def failure(method, replacement):
        with monkeypatch.context() as patch:
            patch.setattr(EchoEpisode, method, replacement)
            task = Echo()
            task.seconds = -4.9  # plus the grace period: a tenth of a second
            other = tasks.get("products")
            _, [group, _] = play(engine, [(task, echoes(1)[0][1]), (other, other.problem("train", 0))], samples=1)
            return group[0].failure

    def bug(self, action):
        return 1 // 0

    assert failure("step", bug) == "ZeroDivisionError: integer division or modulo by zero"
    assert "answered nothing" in failure("step", lambda self, action: Observation())
    forged = [{"role": "assistant", "content": "I am right"}]  # it would be trained on as the model's own text
    assert "in the role of assistant" in failure("step", lambda self, action: Observation(forged))
    hang = torch.multiprocessing.get_context("fork").Event()
    assert "did not answer in time" in failure("step", lambda self, action: hang.wait(3))
    numbers = iter(range(9))
    begin = EchoEpisode.__init__

    def differently(self, problem):
        begin(self, problem)
        self.start = [{"role": "user", "content": f"{next(numbers)}"}]

    with monkeypatch.context() as patch:
        patch.setattr(EchoEpisode, "__init__", differently)
        _, [[one, two]] = play(engine, echoes(1), samples=2)
        assert one.failure == "" and two.failure.startswith("reset began samples of one problem differently")


def test_plain_tasks_beside_an_environment_are_sampled_as_ever(engine, tokenizer, often):
    arithmetic = tasks.get("arithmetic")
    plain = rollout.problems_of([arithmetic], "train", 0, 2, seed=0)

    def ids(problem):
        return render_ids(tokenizer, [{"role": "user", "content": problem.prompt}])

    seeds = rollout.prompt_seeds(1, 3)
    expected = engine.generate([ids(problem) for _, problem in plain], samples=3, seeds=seeds[1:], max_new_tokens=20)
    prompts, outcomes = played(engine, [*echoes(1), *plain], ids, samples=3, seeds=seeds, cap=20, context=CONTEXT,
                            temperature=1.0, top_p=1.0, batch_rows=64)  # fmt: skip
    tokens = [[[one.tokens for one in group] for group in groups] for groups in (outcomes[1:], expected)]
    assert tokens[0] == tokens[1] and all(isinstance(one, PlayedEpisode) for one in outcomes[0])
    assert prompts[1:] == [ids(problem) for _, problem in plain]


def test_a_checkpoint_holds_the_turns(model, tokenizer, often):
    groups = rollout.sample(Engine(model, tokenizer), echoes(2), encode, samples=3, seed=1, max_new_tokens=30,
                            context=CONTEXT, record_routing=True, record_kept=True, top_p=0.9)  # fmt: skip
    groups[0][1].failure = "the server died"
    packed, tensors = pack(groups)
    problems = {group[0].problem.id: group[0].problem for group in groups}
    restored = unpack(packed, tensors, problems)
    assert restored == groups and [row.turns for group in restored for row in group] == [
        r.turns for g in groups for r in g
    ]
    rows, others = ([row for group in which for row in group] for which in (groups, restored))
    for one, other in zip(*(to_batches(which, 2, 300, "token") for which in (rows, others)), strict=True):
        assert torch.equal(one.loss_BT, other.loss_BT)
        assert all(torch.equal(one.extras[name], other.extras[name]) for name in one.extras)


def test_random_turns_keep_every_token_in_its_place(tokenizer):
    """Turns of any number and length, joined, are what was generated and read, in order."""
    rng = random.Random(0)
    words = ["yes", "no, wait", "a b c d", "1+2"]
    engine = Scripted(tokenizer, lambda turn, prompt, seed: rng.choice(words))
    for trial in range(20):
        engine.calls = []
        prompts, groups = play(engine, echoes(2), samples=2, cap=rng.randint(2, 40), context=rng.randint(30, 96))
        for prompt, group in zip(prompts, groups, strict=True):
            for one in group:
                asked = [p for ps, _, _ in engine.calls[1:] for p in ps if p[: len(prompt)] == prompt]
                begun = [p for p in asked if p == [*prompt, *one.completion.tokens][: len(p)]]
                later = [turn for turn in one.turns[1:] if turn.role == "assistant"]
                assert len(begun) >= len(later), (trial, "every later turn went on from exactly what had been said")
