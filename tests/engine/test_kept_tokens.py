"""Which tokens truncation kept, as completions record them: with the kernels and without."""

import pytest
import torch

from bessemer.engine.engine import Engine
from bessemer.engine.kept_tokens import ids_of_mask
from bessemer.errors import UserError

CALL = dict(samples=2, max_new_tokens=16, seed=4, temperature=0.8, top_p=0.9, record_kept=True)


def records(actual):
    return [completion for group in actual for completion in group]


def naive(model, vocab, prompt, completion, top_p, temperature):
    """From the definition, in one forward: the most likely tokens until their mass reaches top_p."""
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.inference_mode():
        logits = model(ids)[0, len(prompt) - 1 : -1].double()
    for logits_V in logits:
        p, order = (logits_V[:vocab] / temperature).softmax(-1).sort(descending=True)
        enough = int((p.cumsum(0) < top_p).sum()) + 1
        yield set(order[:enough].tolist()), logits_V


def listed(completion):
    return [part.tolist() for part in completion.kept.id_M.split(completion.kept.count_T.tolist())]


@pytest.mark.parametrize("kernels", [True, False])
def test_kept_tokens_match_the_definition(engine, prompts, kernels, request):
    if not kernels:
        request.getfixturevalue("torch_steps")
    actual, vocab, sizes = engine.generate(prompts, **CALL), engine.tokenizer.vocab_size, set()
    sets = same = 0
    for prompt, group in zip(prompts, actual, strict=True):
        for one in group:
            for ids, token, logp, (expected, logits_V) in zip(
                listed(one), one.tokens, one.logprobs, naive(engine.model, vocab, prompt, one, 0.9, 0.8), strict=True
            ):
                assert token in ids and ids == sorted(ids)
                within = (logits_V[ids] / 0.8).log_softmax(-1)[ids.index(token)]
                assert logp == pytest.approx(float(within), abs=5e-5), "of these tokens alone"
                sets, same, sizes = sets + 1, same + (set(ids) == expected), sizes | {len(ids)}
    assert same >= 0.99 * sets and len(sizes) > 20
    plain_form = engine.generate(prompts, **CALL | {"record_kept": False})
    for one, other in zip(records(actual), records(plain_form), strict=True):
        assert one.tokens == other.tokens and other.kept is None
        assert all(p > q for p, q in zip(one.logprobs, other.logprobs, strict=True)), "a share of less than all"


def test_a_mask_is_listed_row_by_row():
    mask = torch.rand(9, 65, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[3], mask[4] = False, True
    assert ids_of_mask(mask) == [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"top_p": 1.0}, "with top_p, top_k or min_p"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"drafts": 1}, "record_kept and drafts cannot be combined"),
    ],
)
def test_recording_without_truncation_is_refused(engine, options, complaint):
    with pytest.raises(UserError, match=complaint):
        Engine(engine.model, engine.tokenizer).plan([[5]], **CALL | options)
