"""A rollout survives a round trip through a checkpoint."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from rl_parts import reward, to_batches

from bessemer import tasks
from bessemer.addons.distributed.sample_ahead import pack, unpack
from bessemer.data.chat import render_ids
from bessemer.rl import rollout
from bessemer.train import checkpoint


@pytest.fixture
def groups(engine, tokenizer):
    """A function that makes scored groups of real samples, one of them as if scored by a reward model."""

    def groups(record_routing, top_p=1.0):
        chosen = rollout.problems_of([tasks.get("arithmetic"), tasks.get("countdown")], "train", 0, 3, seed=0)

        def encode(problem):
            return render_ids(tokenizer, [{"role": "user", "content": problem.prompt}])[:40]

        sampled = rollout.sample(
            engine, chosen, encode, samples=4, seed=1, max_new_tokens=12, record_routing=record_routing,
            temperature=0.7, top_p=top_p, record_kept=top_p < 1,
        )  # fmt: skip
        reward("accuracy", ("format", 0.1), ("language", 0.2)).score(sampled)
        sampled[1][1].verdict = replace(sampled[1][1].verdict, partial=0.3)
        sampled[0][1].preference, sampled[2][3].language, sampled[1][0].reward = 1 / 3, 0.7, -0.1
        return sampled

    return groups


@pytest.mark.parametrize("record_routing", [True, False])
def test_nothing_is_lost(groups, record_routing, tmp_path):
    original = groups(record_routing, 0.8 if record_routing else 1.0)
    packed, tensors = pack(original)
    state = checkpoint.State({"extras": tensors}, {"extras": packed})
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, state))
    problems = {group[0].problem.id: group[0].problem for group in original}
    restored = unpack(loaded.counters["extras"], loaded.tensors["extras"], problems)
    assert restored == original, "all but what does not take part in comparisons"
    completions = [[row.completion for group in groups for row in group] for groups in (original, restored)]
    assert len({len(c.tokens) for c in completions[0]}) > 1
    for one, other in zip(*completions, strict=True):
        assert asdict(one) | {"routing": None, "kept": None} == asdict(other) | {"routing": None, "kept": None}
        if record_routing:
            assert torch.equal(one.routing, other.routing) and one.routing.dtype == other.routing.dtype
            for mine, reference in zip(one.kept, other.kept, strict=True):
                assert torch.equal(mine, reference) and mine.dtype == reference.dtype == torch.int32
        else:
            assert one.routing is other.routing is one.kept is other.kept is None
    laid = [to_batches([row for group in g for row in group], 2, 100, "token") for g in (original, restored)]
    for one, other in zip(*laid, strict=True):
        assert all(torch.equal(one.extras[name], other.extras[name]) for name in one.extras)


def test_a_problem_is_named_not_written(groups):
    packed, _ = pack(groups(False))
    text = json.dumps(packed)
    assert '"problem": "arithmetic/train/0/' in text and "meta" not in text
