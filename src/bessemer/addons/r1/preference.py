"""Using reward models: how an answer is rendered for them, and the reward that RL gets (R1 2.3.4, R1-Nature Methods).

    helpful    prompt + final summary          the thoughts are not judged
    harmless   prompt + thoughts + summary     nothing unsafe may appear anywhere

Training (`addons/r1/reward.py`) and RL render an answer with the same function, `judged_ids`, in the model's own
chat template, and read the score at the last token, the EOS.

A reward is the score on a fixed scale learnt from held-out answers: 0 is the mean of the rejected (unsafe) ones, 1 that
of the chosen (safe) ones. It is not clipped, so that reward hacking shows. The scale is saved in `reward.json` next to
the weights, with the aim and the fingerprint of the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from bessemer.addons.families.prompts import Prompt, messages_of
from bessemer.addons.r1.objectives import trained_places
from bessemer.data.batch import Batch
from bessemer.data.chat import render_ids
from bessemer.data.model_files import read_object
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.model.protocol import TrainOutputs
from bessemer.model.transformer import scores
from bessemer.tasks.answer import summary
from bessemer.train.collective import Outputs
from bessemer.train.runtime import Runtime

AIMS = ("helpful", "harmless")
FACTS = "reward.json"
BATCH_TOKENS = 8192
"""Padded tokens per forward; affects only memory and speed."""


@dataclass(frozen=True)
class Scale:
    """The content of `reward.json`."""

    aim: str
    zero: float
    """Score that counts as reward 0."""
    one: float
    """Score that counts as reward 1."""
    tokenizer: str
    """Fingerprint of the tokenizer it was trained with."""

    @classmethod
    def learn(cls, aim: str, bad: Sequence[float], good: Sequence[float], tokenizer: str) -> Scale:
        """The scale for these scores of held-out answers; UserError if the good ones do not score higher on average."""
        low, high = fmean(bad), fmean(good)
        if not high > low:
            raise UserError(
                f"this reward model scores good answers {high:.3f} and bad ones {low:.3f} on average: it learnt "
                "nothing that RL could follow. Train it longer or on more answers, or raise lr"
            )
        return cls(aim, low, high, tokenizer)

    def __call__(self, score: float) -> float:
        return (score - self.zero) / (self.one - self.zero)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Scale:
        values = read_object(path)
        kinds = {"aim": str, "zero": float, "one": float, "tokenizer": str}
        if values.keys() != kinds.keys() or any(not isinstance(values[name], kind) for name, kind in kinds.items()):
            raise UserError(f"{path} must hold {', '.join(kinds)}; train the reward model again")
        if values["aim"] not in AIMS or not -math.inf < values["zero"] < values["one"] < math.inf:
            raise UserError(f"{path} has no sensible scale or aim ({' or '.join(AIMS)}); train the reward model again")
        return cls(**values)


def judged_ids(tokenizer: Tokenizer, aim: str, prompt: Prompt, answer: str) -> list[int]:
    """The input of a reward model of this aim; `answer` includes thoughts and tags."""
    read = summary(answer) if aim == "helpful" else answer
    return render_ids(tokenizer, [*messages_of(prompt), {"role": "assistant", "content": read}])


def score_by(outputs: Outputs, texts: Sequence[Sequence[int]], pad_id: int) -> list[float]:
    """The score at the last token of each text. Texts of similar length share a forward; padding follows them, so no
    text attends to it. Collective, as `outputs` is."""
    parts = [*_batches(texts)]
    batches = [_last_marked([texts[i] for i in part], pad_id) for part in parts]
    scored = outputs(batches, _marked_scores, [*map(len, parts)])
    of_texts = [0.0] * len(texts)
    for part, score_S in zip(parts, scored, strict=True):
        for i, score in zip(part, score_S.tolist(), strict=True):
            of_texts[i] = score
    return of_texts


def _last_marked(texts: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """One text per row, with loss weight only at its last token."""
    shape = len(texts), max(map(len, texts))
    tokens, loss = torch.full(shape, pad_id, dtype=torch.int64), torch.zeros(shape)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids)
        loss[row, len(ids) - 1] = 1.0
    return Batch(tokens, loss)


def _marked_scores(out: TrainOutputs, weight_1D: Tensor, batch: Batch) -> Tensor:
    return scores(out.hidden_BTD[trained_places(batch)], weight_1D)


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Batches of text indices, longest first, each at most BATCH_TOKENS padded tokens (at least one text)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        rows = max(1, BATCH_TOKENS // len(texts[order[0]]))
        yield order[:rows]
        order = order[rows:]


class RewardModel:
    """A trained reward model; RL calls `score`."""

    def __init__(self, outputs: Outputs, tokenizer: Tokenizer, scale: Scale, name: str = "reward model"):
        if tokenizer.fingerprint != scale.tokenizer:
            raise UserError(
                f"{name}: the tokenizer is not the one that the model was trained with; put back its tokenizer.json, "
                "or train the reward model again"
            )
        if not tokenizer.renders:
            raise UserError(f"{name}: its tokenizer has none of our chat templates; train the reward model again")
        self.outputs, self.tokenizer, self.scale, self.name = outputs, tokenizer, scale, name

    @classmethod
    def load(cls, directory: str | Path, runtime: Runtime | None = None) -> RewardModel:
        """`runtime`: divides it over its processes; None: whole, in this one."""
        directory, runtime = Path(directory), runtime or Runtime()
        scale = Scale.read(directory / FACTS)
        return cls(runtime.reward_model(directory), load_tokenizer(directory), scale, str(directory))

    @property
    def aim(self) -> str:
        """helpful or harmless: the prompts it judges (`Problem.meta["aim"]`)."""
        return self.scale.aim

    def score(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """The reward of each (prompt, whole answer): 0 for a typical bad answer, 1 for a typical good one.
        Collective."""
        texts = [judged_ids(self.tokenizer, self.aim, prompt, answer) for prompt, answer in items]
        scores = score_by(self.outputs, texts, self.tokenizer.pad_id)
        for (prompt, _), score in zip(items, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(f"{self.name} scores an answer to {prompt[:80]!r} as {score}; train it again")
        return [self.scale(score) for score in scores]
