"""How good a trained arm is: the numbers of one finished run, all of them teacher-forced, in the arm's precision.

bpb, bpb_PART        bits per byte of held-out rows; bpb is the mean over the parts that were read
bpb_unread           the mean over domains that no arm reads
overfit              held-out minus training bits per byte, if documents were read many times
copy                 share of pages of number puzzles whose target is copied correctly into the first failed try
needle_N             share of hidden words given correctly, with N tokens of text and the needle in its first tenth
cloze                share of sentences whose true continuation is the likeliest of four
maxvio, dead         ratio of the busiest expert's load to the mean, minus 1, and number of experts under a hundredth of
                     the mean, over the validation set (Wang et al. 2024, MaxVio_global); means over layers
rise_best_M          rise in bits per token without every token's M best experts, the next best in their place
rise_random_M        the same without M experts drawn from all for every token
information          what a token's expert (in a dense network: one of its five strongest neurons) says about its
                     domain, as a share of all there is to say; information_untrained: of fresh gates
damage               with a domain's two experts of highest lift in every layer switched off: rise in its own bits per
                     token minus that in the others'; damage_shuffled: with the experts of another domain off
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.evals import long_context
from bessemer.addons.tasks.needle import Needle
from bessemer.config.training import PretrainConfig
from bessemer.data.batch import Batch
from bessemer.data.rows import Rows, open_rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.hf import deepseek
from bessemer.model.transformer import Transformer
from bessemer.tasks import Task, get
from bessemer.train.loss import heldout_nats
from bessemer_claims import probes
from bessemer_claims.controls import ControlledConfig, experts_by_token

ROWS, FEW = 48, 12
"""Held-out rows of each part: for bits per byte, and for what is measured many times."""
DOMAINS = ("fables", "web", "fables-zh", "code", "countdown")
PAGES, NEEDLES, CLOZES = 256, 64, 160
LENGTHS = (64, 128, 240)
"""Tokens of text that hide a needle."""
FIRST_PAGE = 2_000_000
"""Index of the first page of number puzzles, beyond those in the corpus."""
_TRY = re.compile(r"<think>[^<:]*:(\d+)")


class Trained:
    """A finished run, and the data to measure it on."""

    def __init__(self, folder: Path, config: PretrainConfig) -> None:
        self.stages = {path.name.partition("-")[2]: path for path in folder.iterdir() if path.is_dir()}
        self.config = config
        self.model: Transformer = deepseek.load(self.stages["pretrain"] / "model", torch.bfloat16, mtp=False).eval()
        self.tokenizer = Tokenizer.load(self.stages["corpus"] / "tokenizer")
        self.begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        by_token = isinstance(config, ControlledConfig) and config.routing == "token"
        self.table_VLK = experts_by_token(self.model.cfg) if by_token else None

    def rows(self, stage: str = "corpus", split: str = "heldout") -> dict[str, Rows]:
        folders = sorted(path.parent for path in self.stages[stage].glob("*/meta.json"))
        return {folder.name: open_rows(folder, split) for folder in folders}

    def batches(self, rows: Rows, most: int) -> list[Batch]:
        n = min(most, rows.n_rows)
        read = [rows.batch(range(at, min(at + 16, n))) for at in range(0, n, 16)]
        return [self.routed(batch) for batch in read]

    def routed(self, batch: Batch) -> Batch:
        if self.table_VLK is None:
            return batch
        batch.extras["choice_BTLK"] = self.table_VLK[batch.tokens_BT]
        return batch

    def bits(self, rows: Rows, most: int = ROWS) -> float:
        """Bits per byte."""
        nats, tokens = heldout_nats(self.model, self.batches(rows, most))
        return nats / tokens / math.log(2) / rows.bytes_per_token

    @torch.no_grad()
    def scores(self, texts: Sequence[list[int]], ends: Sequence[int]) -> list[tuple[float, bool]]:
        """For each text of ids: (mean log-probability, whether each is the likeliest) of its last `ends` tokens."""
        scored: list[tuple[float, bool]] = []
        for at in range(0, len(texts), 32):
            some = texts[at : at + 32]
            width = max(map(len, some))
            tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in some])
            batch = self.routed(Batch(tokens, torch.zeros(tokens.shape)))
            hidden = self.model.train_outputs(tokens, mtp=False, **batch.routed).hidden_BTD
            for row, ids, end in zip(hidden, some, ends[at : at + 32], strict=True):
                logp = F.linear(row[len(ids) - end - 1 : len(ids) - 1], self.model.head_weight).float().log_softmax(-1)
                target = torch.tensor(ids[-end:])
                own = logp.gather(1, target[:, None])
                scored.append((float(own.mean()), bool((logp.argmax(-1) == target).all())))
        return scored


def numbers(folder: Path, config: PretrainConfig) -> dict[str, float]:
    """All numbers of a run by name."""
    run = Trained(folder, config)
    parts = run.rows()
    bits = {name: run.bits(rows) for name, rows in parts.items()}
    result = {"bpb": statistics.fmean(bits.values()), **{f"bpb_{name}": value for name, value in bits.items()}}
    result["bpb_unread"] = statistics.fmean(run.bits(rows) for rows in run.rows("unread").values())
    if config.source == "few":
        read = run.rows("few", "train")
        result["overfit"] = result["bpb"] - statistics.fmean(run.bits(rows) for rows in read.values())
    result["copy"] = copy(run, get("countdown"))
    needles = long_context.needle("fables-en", 0.05, None)
    result |= {f"needle_{length}": needle(run, needles, length) for length in LENGTHS}
    result["cloze"] = cloze(run, parts["fables"])
    if any(not layer.dense for layer in run.model.layers):
        result |= experts(run, parts)
    else:
        result["information"] = probes.information(probes.neurons(run.model), domain_batches(run, parts))
    return result


def copy(run: Trained, task: Task) -> float:
    """Share of pages `...:TARGET low` with the question's number given right after the first colon of the thoughts."""
    texts, ends = [], []
    for index in range(FIRST_PAGE, FIRST_PAGE + 8 * PAGES):
        page = task.document(index)
        if (match := _TRY.search(page)) is None or match[1] not in re.findall(r"\d+", page[: page.index("<think>")]):
            continue
        target = run.tokenizer.encode(match[1])
        texts.append([*run.begin, *run.tokenizer.encode(page[: match.start(1)]), *target])
        ends.append(len(target))
        if len(texts) == PAGES:
            break
    return statistics.fmean(right for _, right in run.scores(texts, ends))


def needle(run: Trained, task: Needle, length: int) -> float:
    """Share of right answers for the word of one hidden sentence of three (two in short texts), in the first tenth."""
    texts, ends = [], []
    for index in range(NEEDLES):
        problem = task.hidden(
            "test",
            index,
            length - 8,
            0.1,
            3 if length > 100 else 2,
            measure=lambda text: len(run.tokenizer.encode(text)),
        )
        word = run.tokenizer.encode(f" {problem.meta['word']}")
        texts.append([*run.begin, *run.tokenizer.encode(problem.prompt), *word])
        ends.append(len(word))
    return statistics.fmean(right for _, right in run.scores(texts, ends))


def cloze(run: Trained, rows: Rows) -> float:
    """Share of held-out fables' sentences that are likelier, after what precedes them, than three other fables'."""
    fables = [re.split(r"(?<=[.!?”\"])\s+", run.tokenizer.decode(ids)) for ids in rows.documents()]
    fables = [fable for fable in fables if len(fable) > 4]
    texts, ends = [], []
    for item in range(CLOZES):
        own, position = fables[item % len(fables)], 2 + item // len(fables)
        position = min(position, len(own) - 1)
        before = run.tokenizer.encode(" ".join(own[max(0, position - 4) : position]))[-96:]
        for other in range(4):
            fable = own if not other else fables[(item + 7 * other) % len(fables)]
            ending = run.tokenizer.encode(" " + fable[min(position, len(fable) - 1)])[:48]
            texts.append([*run.begin, *before, *ending])
            ends.append(len(ending))
    scores = [score for score, _ in run.scores(texts, ends)]
    return statistics.fmean(max(scores[at : at + 4]) == scores[at] for at in range(0, len(scores), 4))


def domain_batches(run: Trained, parts: dict[str, Rows]) -> dict[str, list[Batch]]:
    return {name: run.batches(parts[name], FEW) for name in DOMAINS}


def experts(run: Trained, parts: dict[str, Rows]) -> dict[str, float]:
    """Loads, masks and specialisation of a network with experts."""
    model, all_batches = run.model, [batch for rows in parts.values() for batch in run.batches(rows, FEW)]
    load_LE = probes.loads(model, all_batches)
    share_LE = load_LE / load_LE.mean(1, keepdim=True)
    result = {"maxvio": float(share_LE.amax(1).mean() - 1), "dead": float((share_LE < 0.01).sum(1).float().mean())}
    plain = _nats(model, all_batches)
    if run.table_VLK is None:
        for mask in (1, 2, 4):
            for kind in ("best", "random"):
                with probes.without(model, mask, kind == "random"):
                    result[f"rise_{kind}_{mask}"] = (_nats(model, all_batches) - plain) / math.log(2)
    domains = domain_batches(run, parts)
    result["information"] = probes.information(probes.choices(model), domains)
    result["information_untrained"] = probes.information(probes.choices(_untrained(model)), domains)
    result |= _damage(model, domains)
    return result


def _untrained(model: Transformer) -> Transformer:
    return Transformer(model.cfg).initialise(0).to_compute(torch.bfloat16).eval()


def _nats(model: Transformer, batches: list[Batch]) -> float:
    """Per token."""
    nats, tokens = heldout_nats(model, batches)
    return nats / tokens


def _damage(model: Transformer, domains: dict[str, list[Batch]]) -> dict[str, float]:
    names = list(domains)
    load_ALE = torch.stack([probes.loads(model, batches) for batches in domains.values()])
    lift_ALE = load_ALE / load_ALE.sum(-1, keepdim=True) / load_ALE.sum(0).div(load_ALE.sum((0, 2))[:, None])
    plain = {name: _nats(model, batches) for name, batches in domains.items()}
    rise_AA = torch.zeros(len(names), len(names))  # [experts of, measured on]
    for a in range(len(names)):
        with probes.switched_off(model, lift_ALE[a].topk(2, dim=-1).indices):
            rise_AA[a] = torch.tensor([_nats(model, domains[name]) - plain[name] for name in names])
    rise_AA /= math.log(2)
    return {"damage": _own_less_others(rise_AA), "damage_shuffled": _own_less_others(rise_AA.roll(1, 0))}


def _own_less_others(rise_AA: Tensor) -> float:
    own, n = rise_AA.diagonal().mean(), len(rise_AA)
    return float(own - (rise_AA.sum() - rise_AA.diagonal().sum()) / (n * (n - 1)))
