"""lm-eval on our models: its model interface (`lm_eval.api.model.LM`) over the Engine, and its results as our rows.

Importing this module imports lm-eval, an optional dependency. Custom tasks (YAML with local JSONL) work offline. A
task's YAML may name Python functions, which run as part of lm-eval: include only folders you trust.

What is scored
- A context begins with BOS, as every document in training did (HFLM with add_bos_token=True). An empty context is BOS;
  if the tokenizer has none, the end of the text before, as in HFLM.
- Context and continuation are one text: spaces at the end of the context belong to the continuation, and the ids of the
  whole are split where the context's ids end. If a token crosses that border, there is no such place; both are then
  encoded separately, as prompt and completion are in the Engine.
- Requests longer than max_seq_len lose ids on the left, and are counted in `truncated`.
- A continuation is greedy if each of its ids is the likeliest of the whole vocabulary.

Shapes: B rows, T tokens (padded on the right), M scored positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bessemer.addons.evals.mean_interval import wilson
from bessemer.data import chat as templates
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.transformer import evaluating
from bessemer.train.loss import chunk_rows

BATCH_TOKENS = 16384
"""Tokens per forward pass, padding included."""
MAX_GEN_TOKENS = 256
"""New tokens for tasks that set no limit, as in lm-eval's own models; at most half of max_seq_len."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Keys that tasks use for the number of new tokens; the first one present is used, as in lm-eval."""
ACCURACIES = ("exact_match", "acc")
"""Metrics that are an accuracy; the first one that a task has becomes its pass_at_1."""


class _Scored(NamedTuple):
    """The ids of a continuation to score, and of its context."""

    context: list[int]
    continuation: list[int]


class BessemerLM(LM):
    """One of our models behind lm-eval's interface."""

    def __init__(self, engine: Engine, batch_tokens: int = BATCH_TOKENS) -> None:
        super().__init__()
        self.engine, self.batch_tokens = engine, batch_tokens
        bos = engine.tokenizer.bos_id
        self._prefix = engine.tokenizer.stop_ids[-1] if bos is None else bos  # the first token needs one before it
        self.truncated = 0
        """Requests whose context was truncated on the left."""
        self._rendered: dict[str, list[int]] = {}
        """Ids of the conversations that `apply_chat_template` rendered: in their text, a control token cannot be
        distinguished from a question that spells one."""

    @property
    def max_length(self) -> int:
        return self.engine.model.cfg.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.engine.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        tokenizer = self.engine.tokenizer
        ids = templates.render_ids(tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        assert tokenizer.chat_style is not None, "`evaluate` refuses --chat for a model without one of our templates"
        text = templates.render(chat_history, tokenizer.chat_style, add_generation_prompt)
        self._rendered[text] = ids
        return text

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) for every (context, continuation)."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of texts after the prefix, in windows of max_seq_len that overlap as far as they can."""
        pieces: list[_Scored] = []
        counts = []
        for request in requests:
            ids = self.engine.tokenizer.encode(request.args[0])
            windows = list(get_rolling_token_windows(ids, self._prefix, self.max_length, 1))
            pieces += [_Scored(*make_disjoint_window(window)) for window in windows]
            counts.append(len(windows))
        scores = iter(self._score(pieces))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Completions up to a stop string; requests with the same generation settings run together."""
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for settings, numbers in groups.items():
            sampling, room = self._sampling(json.loads(settings))
            prompts = [self._cut(self._context(requests[number].args[0]), room) for number in numbers]
            for number, (completion,) in zip(numbers, self.engine.generate(prompts, **sampling), strict=True):
                texts[number] = completion.text
        return texts

    def _context(self, text: str) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not self._rendered:
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            return [*bos, *tokenizer.encode(text)] or [self._prefix]
        if text in self._rendered:
            return self._rendered[text]
        conversation = max(
            (rendered for rendered in self._rendered if text.startswith(rendered)), key=len, default=None
        )
        if conversation is None:
            raise UserError(f"a context does not begin with the model's chat template: {text[:60]!r}; leave --chat out")
        ids = self._rendered[conversation]
        return ids + tokenizer.encode(text[len(conversation) :], ids[-1])

    def _pair(self, context: str, continuation: str) -> _Scored:
        encode = self.engine.tokenizer.encode
        if self._rendered:
            ids = self._context(context)
            return _Scored(ids, encode(continuation, ids[-1]))
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        prefix, text = self._context(bare), self._context(bare + continuation)
        joined = text[: len(prefix)] == prefix
        return _Scored(prefix, text[len(prefix) :] if joined else encode(continuation, prefix[-1]))

    def _cut(self, ids: list[int], room: int) -> list[int]:
        self.truncated += len(ids) > room
        return ids[-room:]

    def _sampling(self, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The Engine's sampling options, and the number of tokens they leave for a prompt."""
        unread = dict(settings)
        lengths = [unread.pop(name) for name in LENGTHS if name in unread]
        until, temperature = unread.pop("until", None) or [], unread.pop("temperature", None)
        sampled = unread.pop("do_sample", bool(temperature))
        sampling: dict[str, Any] = {
            "max_new_tokens": int(lengths[0]) if lengths else min(MAX_GEN_TOKENS, self.max_length // 2),
            "temperature": float(1.0 if temperature is None else temperature) if sampled else 0.0,
            "stop_strings": [until] if isinstance(until, str) else list(until),
        }
        sampling |= {name: unread.pop(name) for name in ("top_p", "top_k", "min_p") if name in unread}
        if unread:
            raise UserError(
                f"generation_kwargs has {', '.join(unread)}, which the engine does not support; known: until, "
                "max_gen_toks, do_sample, temperature, top_p, top_k, min_p"
            )
        room = self.max_length - sampling["max_new_tokens"]
        if room < 1:
            raise UserError(
                f"a task requests {sampling['max_new_tokens']} new tokens, but the model's max_seq_len is "
                f"{self.max_length}; lower max_gen_toks in the task's generation_kwargs"
            )
        return sampling, room

    def _score(self, pieces: list[_Scored]) -> list[tuple[float, bool]]:
        rows: list[tuple[list[int], int]] = []  # (ids, how many of them are scored, counted from the end)
        for context, continuation in pieces:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, but the model's max_seq_len is {self.max_length}; "
                    "score such texts with output_type: loglikelihood_rolling"
                )
            rows.append((self._cut(context + continuation, self.max_length + 1), len(continuation)))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        batches = list(_batches(order, rows, self.batch_tokens))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        scored = self.engine.workers.map(self._score_batch, ([rows[i] for i in batch] for batch in batches))
        for batch, scores in zip(batches, scored, strict=True):
            for i, result in zip(batch, scores, strict=True):
                results[i] = result
        return results

    def _score_batch(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        model = self.engine.model
        device = model.embed.weight.device
        width = max(len(ids) for ids, _ in rows) - 1
        tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)  # padding on the right is hidden by causality
        places, targets = [], []
        for i, (ids, scored) in enumerate(rows):
            tokens_BT[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            places += [i * width + t for t in range(len(ids) - 1 - scored, len(ids) - 1)]
            targets += ids[len(ids) - scored :]
        if not places:
            return [(0.0, True)] * len(rows)
        place_M, target_M = torch.tensor(places, device=device), torch.tensor(targets, device=device)
        logp, greedy = [], []
        with evaluating(model), torch.inference_mode():
            h_MD = model.train_outputs(tokens_BT.to(device), mtp=False).hidden_BTD.flatten(0, 1)[place_M]
            size = chunk_rows(model.head_weight)
            for h_CD, target_C in zip(h_MD.split(size), target_M.split(size), strict=True):
                logp_CV = F.linear(h_CD, model.head_weight).float().log_softmax(-1)
                logp.append(logp_CV.gather(1, target_C[:, None]).squeeze(1))
                greedy.append(logp_CV.argmax(-1) == target_C)
        counts = [scored for _, scored in rows]
        return [
            (float(values.double().sum()), bool(right.all()))
            for values, right in zip(torch.cat(logp).split(counts), torch.cat(greedy).split(counts), strict=True)
        ]


def _batches(order: list[int], rows: list[tuple[list[int], int]], tokens: int) -> Iterator[list[int]]:
    """Rows of similar length, longest first, with at most `tokens` padded tokens in a batch (at least one row)."""
    start = 0
    while start < len(order):
        stop = start + max(1, tokens // len(rows[order[start]][0]))
        yield order[start:stop]
        start = stop


def evaluate(
    engine: Callable[[], Engine], names: Sequence[str], *, include: Path | None, limit: int | None, chat: bool
) -> list[dict[str, Any]]:
    """An evaluation row (`scoring`) for every task that `names` (tasks, groups, tags) stand for. `include`: folder with
    your own tasks; `limit`: the most questions per task; `chat`: ask in the model's template."""
    manager = _manager(names, include)
    lm = BessemerLM(engine())
    if chat and lm.engine.tokenizer.chat_style is None:
        raise UserError("the model has none of Bessemer's chat templates; leave --chat out")
    try:
        with _no_commit():
            results = simple_evaluate(
                lm, tasks=list(names), task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False,
                bootstrap_iters=1000,
            )  # fmt: skip
    except OSError as error:  # the datasets library's own errors all derive from it
        raise UserError(
            f"the data of {', '.join(names)} cannot be read ({str(error).splitlines()[0]}). Built-in tasks download "
            "theirs; without a network, write a task whose dataset_path is json and whose data_files are local"
        ) from error
    return [
        _row(name, values, results, lm) for name, values in results["results"].items() if name in results["configs"]
    ]


@contextmanager
def _no_commit() -> Iterator[None]:
    """lm-eval asks git for the commit of the working directory, which prints git's error outside a repository."""
    original = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = original


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """The tasks of `include` alone if they suffice: reading lm-eval's thousands of tasks takes seconds."""
    if include is not None and not include.is_dir():
        raise UserError(f"there is no folder {include}; --include is the folder of your task YAML files")
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=str(include) if include else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them."
            raise UserError(f"lm-eval has no task {name!r}; {hint} Tasks of your own: --include FOLDER")
    return manager


def _row(name: str, values: dict[str, Any], results: dict[str, Any], lm: BessemerLM) -> dict[str, Any]:
    """lm-eval's "metric,filter" keys as a row, with Wilson's interval: a standard error is 0 if all are right."""
    n = results["n-samples"][name]["effective"]
    metrics: dict[str, dict[str, float | None]] = {
        key.removesuffix(",none"): {"value": float(value), "stderr": _number(values.get(key.replace(",", "_stderr,")))}
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    metric = next((key for kind in ACCURACIES for key in metrics if key.split(",")[0] == kind), None)
    value: float | None = None
    interval: list[float] | None = None
    if metric is not None:
        value = metrics[metric]["value"]
        assert value is not None, "the values of lm-eval's metrics are numbers"
        interval = list(wilson(value, n))
    settings = dict(results["configs"][name].get("generation_kwargs") or {})
    sampling = lm._sampling(settings)[0] if settings else {}
    return {
        "task": name,
        "domain": "lm-eval",
        "language": "",
        "n": n,
        "samples": 1,
        "k": 1,
        "temperature": sampling.get("temperature", 0.0),
        "top_p": float(sampling.get("top_p", 1.0)),
        **dict.fromkeys(("pass_at_1", "pass_at_k", "maj_at_k"), value),
        **dict.fromkeys(("pass_at_1_interval", "pass_at_k_interval", "maj_at_k_interval"), interval),
        "by_difficulty": {},
        "metric": metric,
        "metrics": metrics,
        "shots": results["n-shot"].get(name, 0),
        "contexts_cut": lm.truncated,
    }


def _number(value: object) -> float | None:
    """None for lm-eval's "N/A", which stands for no standard error."""
    return float(value) if isinstance(value, int | float) else None
