"""Decoding with an MTP module's guesses (V3 5.4.3): processor time against decoding without, one answer at a time.

One network reads countdown pages and answers held-out questions: text it has not seen. Then it learns one page by heart
and recites it: the most that guessing can gain at this depth. With a freshly initialised module it guesses at random.
"""

from __future__ import annotations

import statistics
import time
from typing import cast

import torch
from torch import nn

from bessemer import tasks
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.loss import cross_entropy

DRAFTS = (1, 2, 3)
PAGES, ROWS, WINDOW, STEPS, LEARNT = 1000, 8, 128, 200, 0.03
QUESTIONS, NEW, BY_HEART, ROUNDS = 6, 96, 200, 3


def numbers(layers: int, seed: int) -> dict[str, float]:
    """`unseen`, `memorised` and `random`: how many times as fast as without guesses, for the best number of guesses;
    `accepted N`: share of N guesses that the network accepts on unseen text."""
    task = tasks.get("countdown")
    pages = [task.document(i, seed) for i in range(PAGES)]
    tokenizer = Tokenizer.train(pages, 420)
    ids = torch.tensor(
        [i for page in pages for i in (tokenizer.bos_id or 0, *tokenizer.encode(page), tokenizer.eos_id)]
    )
    model = Transformer(preset("tiny", vocab_size=tokenizer.vocab_size, n_layers=layers)).initialise(seed)
    _learn(model, ids, STEPS, seed)
    prompts = [question_ids(tokenizer, task.problem("test", i).prompt) for i in range(QUESTIONS)]
    faster, accepted = _faster(model, tokenizer, prompts, NEW)
    other, module = Transformer(model.cfg).initialise(seed + 1), cast(nn.Module, model.mtp)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(cast(nn.Module, other.mtp).state_dict())
    random, _ = _faster(model, tokenizer, prompts, NEW)
    module.load_state_dict(own)
    text = ids[: BY_HEART + 1]
    _learn(model, text, STEPS, seed)
    memorised, _ = _faster(model, tokenizer, [text[:16].tolist()], BY_HEART - 16)
    best = max(faster, key=faster.__getitem__)
    return {
        "unseen": faster[best], "guesses": best, "random": max(random.values()), "memorised": max(memorised.values()),
    } | {f"accepted {drafts}": share for drafts, share in accepted.items()}  # fmt: skip


def _learn(model: Transformer, ids: torch.Tensor, steps: int, seed: int) -> None:
    """Trains for at most `steps` steps; fewer once the losses of the network and of its module are small."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    generator, window = torch.Generator().manual_seed(seed), min(WINDOW, len(ids) - 2)
    smooth = [9.0, 9.0]
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - window - 1, (ROWS,), generator=generator).tolist()
        rows_BT = torch.stack([ids[start : start + window + 2] for start in starts])
        out = model.train_outputs(rows_BT[:, :-1])
        losses = []
        for k, hidden_BTD in enumerate((out.hidden_BTD, out.mtp_hidden[0]), start=1):
            target_BT = rows_BT[:, k : k + hidden_BTD.shape[1]]
            kept_BTD = hidden_BTD[:, : target_BT.shape[1]]
            total = cross_entropy(kept_BTD, model.head_weight, target_BT, torch.ones(target_BT.shape))
            losses.append(total / target_BT.numel())
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = [0.9 * old + 0.1 * float(new.detach()) for old, new in zip(smooth, losses, strict=True)]
        if max(smooth) < LEARNT:
            break
    model.eval()


def _faster(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], new: int
) -> tuple[dict[int, float], dict[int, float]]:
    """(times as fast as without guesses, share accepted), each by the number of guesses; the runs take turns."""
    engine = Engine(model, tokenizer)
    seconds: dict[int, list[float]] = {drafts: [] for drafts in (0, *DRAFTS)}
    answers: dict[int, list[int]] = {}
    accepted: dict[int, float] = {}
    for round_ in range(-1, ROUNDS):
        for drafts, times in seconds.items():
            began, drafted, n_accepted = time.process_time(), 0.0, 0.0
            answers[drafts] = []
            for prompt in prompts:
                scheduler = Scheduler(engine, rows=1, drafts=drafts)
                scheduler.add(Request(tuple(prompt), 1, new, SamplingParams(0.0), ()))
                while not scheduler.is_idle:
                    answers[drafts] += [event.token for event in scheduler.step() if isinstance(event, Token)]
                figures = scheduler.stats()
                drafted, n_accepted = drafted + figures.get("drafted", 0), n_accepted + figures.get("accepted", 0)
            if round_ >= 0:  # the first one warms up
                times.append(time.process_time() - began)
            accepted[drafts] = n_accepted / max(1.0, drafted)
    assert all(tokens == answers[0] for tokens in answers.values()), "guesses changed an answer"
    ratios = {
        drafts: statistics.median(a / b for a, b in zip(seconds[0], times, strict=True))
        for drafts, times in seconds.items()
        if drafts
    }
    return ratios, {drafts: accepted[drafts] for drafts in DRAFTS}
