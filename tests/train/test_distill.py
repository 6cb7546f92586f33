"""Logit distillation: divergence and gradient against a naive sum, and the student moves towards the teacher."""

import copy
from dataclasses import replace

import pytest
import tiny_run
import torch
from completions import completion

from bessemer.addons.r1.distill import Distill
from bessemer.addons.r1.objectives import OnPolicyDistillation
from bessemer.addons.r1.tables import DistillConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.rl.rollout import Packing, ScoredSample
from bessemer.tasks.base import Problem, Verdict


@pytest.fixture
def pair():
    return tiny_run.model(1), tiny_run.model(2)


def batch(rows=3, length=9, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.ones(rows, length)
    loss[:, :3] = 0.0
    loss[1, 6:] = 0.0
    return Batch(torch.randint(0, vocab, (rows, length), generator=generator), loss)


def naive(student, teacher, made, temperature):
    """The divergence, summed token by token in float64 from all logits."""
    total = torch.zeros((), dtype=torch.float64)
    s, t = ((model(made.tokens_BT).double() / temperature).softmax(-1) for model in (student, teacher))
    for b, at in made.loss_BT.nonzero().tolist():
        p, q = s[b, at - 1], t[b, at - 1]
        total = total + (p * (p.log() - q.log())).sum() * made.loss_BT[b, at]
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sum_and_its_gradient_against_a_naive_loop(pair, temperature):
    student, teacher = pair
    made = batch(vocab=student.cfg.vocab_size)
    loss = OnPolicyDistillation((teacher,), temperature)(student, made)
    assert loss.tokens == made.loss_BT.sum()
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters()), "the teacher is frozen"
    actual = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    student.zero_grad()
    expected = naive(student, teacher, made, temperature)
    expected.backward()
    want = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (actual - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_heads_that_are_padded_differently_are_compared_over_the_common_rows(pair, padded):
    def cut(model, rows):
        short = copy.deepcopy(model)
        short.head = type(model.head)(model.head.in_features, rows)
        short.head.weight.data.copy_(model.head.weight[:rows])
        return short

    rows = pair[0].cfg.vocab_size - 8
    made, short = batch(vocab=rows), [cut(model, rows) for model in pair]
    student, teacher = (short[0], pair[1]) if padded == "teacher" else (pair[0], short[1])
    expected = OnPolicyDistillation((short[1],))(short[0], made).total
    actual = OnPolicyDistillation((teacher,))(student, made).total
    actual.backward()
    assert actual.item() == expected.item() and student.head.weight.grad.shape == student.head.weight.shape


def test_equal_models_do_not_diverge(pair):
    student = pair[0]
    loss = OnPolicyDistillation((copy.deepcopy(student),))(student, batch(vocab=student.cfg.vocab_size))
    assert abs(loss.total.item()) < 1e-5


def test_every_row_follows_its_own_teacher(pair):
    student, first = pair
    other_teacher = tiny_run.model(3)
    objective, made = OnPolicyDistillation((first, other_teacher)), batch(vocab=student.cfg.vocab_size)
    for number, teacher in enumerate((first, other_teacher)):
        alone = OnPolicyDistillation((teacher,))(student, made).total
        assert objective(student, replace(made, teacher=number)).total.item() == alone.item()
    assert replace(made, teacher=1).as_filler().teacher == replace(made, teacher=1).to("cpu").teacher == 1


def test_packed_samples_give_the_loss_and_gradient_of_a_row_for_each(pair):
    """Two teachers, in float64; the padded rows hold more positions."""
    student, *teachers = (tiny_run.model(seed, max_seq_len=64).double() for seed in (1, 2, 3))
    drawn = torch.Generator().manual_seed(5)
    samples = []
    for number in range(24):
        ids = torch.randint(3, tiny_run.V, (2 + number % 3 + 1 + 5 * number % 23,), generator=drawn).tolist()
        prompt = 2 + number % 3
        verdict, problem = Verdict(True, True, "", None), Problem("p", "", "en")
        samples.append(ScoredSample(problem, ids[:prompt], completion(ids[prompt:]), verdict, 1.0))
    objective, sums, positions = OnPolicyDistillation(tuple(teachers), 0.9), [], []
    for packs in (False, True):
        packing = Packing(60, 2, packs=packs)
        batches = [
            replace(packing.batch(part, part), teacher=teacher)
            for teacher in (0, 1)
            for part in packing.parts(samples[teacher::2])
        ]
        student.zero_grad()
        losses = [objective(student, made) for made in batches]
        sum(loss.total for loss in losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        sums.append((sum(float(loss.total) for loss in losses), sum(float(loss.tokens) for loss in losses), gradient))
        positions.append(sum(made.tokens_BT.numel() for made in batches))
        assert sum(made.counted[0] for made in batches) == len(samples)
    (padded, tokens, expected), (packed, same_tokens, actual) = sums
    assert packed == pytest.approx(padded, rel=1e-6) and tokens == same_tokens
    assert (actual - expected).norm() <= 1e-6 * expected.norm() and positions[1] < positions[0]


def test_a_task_without_a_teacher_is_refused():
    config = DistillConfig(kind="distill", name="one", tasks=["arithmetic", "countdown"], teachers={"countdown": "r1"})
    with pytest.raises(UserError, match=r"arithmetic has no teacher.*teachers"):
        Distill().resolve(config, None)
