"""How fast this machine does the work of a recipe's stages, from seconds of measurement before a run.

Measured with the real trainer and the real engine, once for every network, precision, FP8, optimizer and micro-batch
that a stage trains with, and once for every network that samples. What is too little to matter, too large for this
machine, or of another family is guessed (`guess`).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bessemer.addons.accelerate import compiling
from bessemer.addons.plan.guess import fixed, guessed, of_stage
from bessemer.config.recipe import Recipe
from bessemer.config.table import Precision, StageConfig
from bessemer.config.training import OnPolicyConfig, OptimizerConfig, PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model import ops
from bessemer.model.accounting import flops_per_token, stored_params
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import train_in_fp8
from bessemer.model.transformer import Transformer
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.pretrain import training_plan
from bessemer.pipeline.work import StageWork
from bessemer.runs.files import read_json, write_json
from bessemer.system import memory
from bessemer.tasks.arithmetic import Arithmetic
from bessemer.train import lineage, objective, setup
from bessemer.train.trainer import Trainer

SECONDS = 1.5
"""Of a measurement before a run; two thirds of it count."""
WORTH = 20.0
"""Seconds that a kind of work must be guessed to take in all before its rate is measured."""
LONGEST = 8.0
"""Seconds that the smallest measurement may be guessed to take; beyond them nothing is measured."""
FRESH = 600.0
"""Seconds for which a measurement is used again by later commands. Not longer: a machine gets busy and idle again."""
BYTES = 16
"""Of a parameter in training: weights, gradients and two moments in float32."""


class Pace:
    """Tokens per second on this machine: stages that share what a rate depends on share one measurement."""

    def __init__(
        self, recipe: Recipe, seconds: float = SECONDS, worth: float = WORTH, cache: Path | None = None,
        base: PretrainConfig | None = None, ranks: int = 1, say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """`base`: the stage whose network stands for those of other families. `cache`: folder of fresh measurements.
        `ranks`: of the run; with several nothing is measured, and they share what is guessed for one. `say` tells
        that it measures, before it does."""
        self.recipe, self.seconds, self.worth, self._base, self._ranks = recipe, seconds, worth, base, ranks
        self._say = say
        self.work: dict[str, list[StageWork]] = {}
        """What is counted of each stage."""
        self.shown: dict[str, float] = {}
        self.compiled = False
        self._found: dict[str, float | None] = {}
        self._guesses = dict[str, float]()
        self._cache = None if cache is None else cache / "rates.json"
        self._kept = {} if self._cache is None else _fresh(self._cache)

    def of_stages(self, stages: Sequence[StageConfig]) -> dict[str, float]:
        """Stage -> its seconds."""
        self.work = work = {stage.name: find_kind(stage.kind)().work(stage, self.recipe) for stage in stages}
        for stage in stages:  # what is worth a measurement depends on the whole run
            for counted in work[stage.name]:
                for kind, part in _parts(counted):
                    key = self._key(kind, stage, counted)
                    self._guesses[key] = self._guesses.get(key, 0.0) + guessed(self.recipe, part)
        return {stage.name: sum(self._of(stage, counted) for counted in work[stage.name]) for stage in stages}

    def _of(self, stage: StageConfig, work: StageWork) -> float:
        return fixed(self.recipe, work) + sum(self._of_part(stage, kind, part) for kind, part in _parts(work))

    def _of_part(self, stage: StageConfig, kind: str, part: StageWork) -> float:
        """Seconds of work of one kind."""
        key = self._key(kind, stage, part)
        settings = self._settings(stage, part)
        idle = self._ranks > 1 or (key not in self._found and self._guesses[key] < self.worth)
        if settings is None or idle:
            return guessed(self.recipe, part) / self._ranks
        if key not in self._found:
            stored = self._kept.get(key)
            self._found[key] = stored["rate"] if stored else None
            # what cannot be measured is guessed; what is wrong with it, the stage itself will say
            with suppress(RuntimeError, UserError):
                self._found[key] = self._found[key] or self._measure(kind, stage, settings, self._length(settings))
            self._keep(key)
        if (rate := self._found[key]) is None:
            return guessed(self.recipe, part)
        if kind == "decoding":
            return part.sampled / rate
        cfg = setup.model_config(self.recipe, settings.model)
        cost = flops_per_token(cfg, part.length).training / flops_per_token(cfg, self._length(settings)).training
        return (part.trained + part.read / 3) * cost / rate

    def _settings(self, stage: StageConfig, work: StageWork) -> PretrainConfig | None:
        """The stage of pre-training whose network the work is done with, with what the stage itself trains with."""
        origin = lineage.origin(self.recipe, work.model)
        base = origin if isinstance(origin, PretrainConfig) else self._base
        if base is None or base is stage or not isinstance(stage, OptimizerConfig):
            return base
        own: dict[str, Any] = {key: getattr(stage, key) for key in ("fp8", "precision", "optimizer")}
        if isinstance(stage, OnPolicyConfig):  # its updates leave the MTP modules out
            own["mtp_lambda"] = Points(0.0)
        return base.model_copy(update=own | {"compile": "off"})

    def _length(self, settings: PretrainConfig) -> int:
        corpus = self.recipe.stage(settings.source) if settings.source else None
        return getattr(corpus, "row_length", 256)

    def _key(self, kind: str, stage: StageConfig, work: StageWork) -> str:
        if (settings := self._settings(stage, work)) is None:
            return kind
        cfg = setup.model_config(self.recipe, settings.model)
        precision: Precision = getattr(stage, "precision", "device")
        # what "auto" stands for is measured only if it comes to that
        dtype = precision if precision == "auto" else str(setup.precision_on(precision, setup.device()).dtype)
        how: list[object] = [kind, ops.backend(setup.device()), setup.workers().n, dtype, cfg.model_dump()]
        if kind == "training":
            mtp = any(settings.mtp_lambda.values)
            how += [settings.fp8, settings.micro_rows, settings.optimizer, self._length(settings), mtp]
        return json.dumps(how)

    def _measure(self, kind: str, stage: StageConfig, settings: PretrainConfig, length: int) -> float | None:
        """Tokens per second, or None where measuring would take too long or more memory than there is."""
        cfg, on_gpu = setup.model_config(self.recipe, settings.model), setup.device().type == "cuda"
        room = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory()
        rows = self._rows(stage, settings, length)
        smallest = StageWork(stage.name, sampled=256 * 16) if kind == "decoding" else StageWork(stage.name)
        too_large = BYTES * stored_params(cfg) > room / 2 or not cfg.kv_lora_rank
        if rows is None or too_large or guessed(self.recipe, smallest) > LONGEST:
            return None
        if not self.shown:
            self._say("measuring how fast this machine trains and samples ...")
        setup.keep_memory()
        with torch.random.fork_rng(devices=[0] if on_gpu else []):
            if kind == "decoding":
                dtype = setup.choose_precision(getattr(stage, "precision", "device")).dtype
                rate = decoding_rate(self._network(cfg, None).to_compute(dtype), self.seconds)
            else:
                smaller = settings.model_copy(update={"batch_rows": Points(rows)})
                rate = training_rate(self._network(cfg, settings, length), smaller, length, self.seconds)
        gc.collect()  # a trainer is part of reference cycles; its memory and its workers end now
        if on_gpu:
            torch.cuda.empty_cache()
        metric = f"{kind}_tokens_per_second"
        self.shown[f"{metric}_of_{stage.name}" if metric in self.shown else metric] = rate
        return rate

    def _rows(self, stage: StageConfig, settings: PretrainConfig, length: int) -> int | None:
        """Rows of a step to measure: the stage's own, or fewer if a step takes long."""
        rows = max(1, round(settings.batch_rows(settings.tokens)))
        seconds = guessed(self.recipe, StageWork(stage.name, trained=length, length=length))
        if seconds > LONGEST:
            return None
        return rows if rows * seconds <= LONGEST else max(1, int(LONGEST / seconds))

    def _network(self, cfg: ModelConfig, settings: PretrainConfig | None, length: int = 0) -> Transformer:
        model = Transformer(cfg).initialise(self.recipe.seed).to(setup.device())
        if settings is None:
            return model
        if settings.fp8 != "off":
            train_in_fp8(model, settings.fp8)
            return model
        flops = settings.tokens * flops_per_token(cfg, length, mtp=cfg.n_mtp > 0).training
        if self.seconds > SECONDS and compiling.want_compile(settings.compile, flops):  # compiling takes a minute
            compiling.compile_layers([*model.layers, *model.mtp])
            self.compiled = True
        return model

    def _keep(self, key: str) -> None:
        rate = self._found[key]
        if self._cache is None or rate is None or key in self._kept:
            return
        self._kept[key] = {"rate": rate, "time": time.time()}
        with suppress(OSError):  # the cache may not be writable
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._cache, self._kept)


def estimate(
    recipe: Recipe, due: Sequence[StageConfig], cache: Path, n_processes: int, say: Callable[[str], None],
    worth: float | None = None,
) -> tuple[dict[str, float], frozenset[str]]:  # fmt: skip
    """Seconds of every stage, at rates measured here for those that are `due`, and the due stages that no model works
    in."""
    pace = Pace(recipe, worth=WORTH if worth is None else worth, cache=cache, ranks=n_processes, say=say)
    seconds = pace.of_stages(due)
    texts = (name for name, work in pace.work.items() if all(part.model is None for part in work))
    return {stage.name: seconds.get(stage.name, 0.0) or of_stage(stage, recipe) for stage in recipe.stages}, frozenset(
        texts
    )


def _parts(work: StageWork) -> list[tuple[str, StageWork]]:
    """The work of each kind that has a rate of its own, without its fixed seconds."""
    parts = []
    if work.trained or work.read:
        parts.append(("training", StageWork(work.model, trained=work.trained, read=work.read, length=work.length)))
    if work.sampled:
        parts.append(("decoding", StageWork(work.model, sampled=work.sampled, length=work.length)))
    return parts


def training_rate(model: Transformer, settings: PretrainConfig, length: int, seconds: float) -> float:
    """Tokens per second of the stage's trainer, on random tokens. Steps in the first third of the time do not count,
    because kernels are then compiled for every number of rows that an expert may get."""
    choice = setup.choose_precision(settings.precision)
    trainer = Trainer(
        model, objective.next_token, None, settings, training_plan(settings, choice.dtype, setup.workers()),
        warn=lambda text: None,
    )  # fmt: skip
    rows = max(1, round(settings.batch_rows(settings.tokens)))
    sizes = [min(settings.micro_rows, rows - first) for first in range(0, rows, settings.micro_rows)]

    def step() -> None:
        trainer.update(_batch(size, length, model) for size in sizes)

    def steps(least: int, seconds: float) -> float:
        """Median seconds per step, because other work on the machine comes in bursts."""
        times: list[float] = []
        while len(times) < least or sum(times) < seconds:
            began = time.monotonic()
            step()
            times.append(time.monotonic() - began)
        return statistics.median(times)

    try:
        steps(1, seconds / 3)
        return rows * length / steps(2, seconds)
    finally:
        trainer.close()


def _batch(rows: int, length: int, model: Transformer) -> Batch:
    tokens = torch.randint(0, model.cfg.vocab_size, (rows, length))
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    return Batch(tokens, loss).to(model.embed.weight.device)


def decoding_rate(model: Transformer, seconds: float) -> float:
    """Tokens per second of the engine with a batch as large as a rollout's, on all cores. The network is untrained, and
    answers run to their cap."""
    workers = setup.workers()
    task = Arithmetic()
    tokenizer = Tokenizer.train((task.document(i) for i in range(200)), min(400, model.cfg.vocab_size))
    engine = Engine(model, tokenizer, workers)
    assert tokenizer.bos_id is not None, "our own tokenizer has one"
    prompts = [[tokenizer.bos_id, *tokenizer.encode(task.document(i))[:40]] for i in range(16)]
    tokens, done, began = 16, 0, time.monotonic()
    while True:
        answers = engine.generate(prompts, samples=16, max_new_tokens=tokens, stop_ids=(), batch_rows=128)
        done += sum(len(answer.tokens) for group in answers for answer in group)
        if time.monotonic() - began > seconds:
            return done / (time.monotonic() - began)
        tokens = min(2 * tokens, model.cfg.max_seq_len - 41)


def _fresh(cache: Path) -> dict[str, dict[str, float]]:
    """The measurements in a file that are not too old, by key; none if the file is not what `Pace` writes."""
    fresh = {}
    for key, entry in (read_json(cache) or {}).items():
        with suppress(TypeError, KeyError, ValueError):
            if 0 <= time.time() - float(entry["time"]) < FRESH and float(entry["rate"]) > 0:
                fresh[key] = {"rate": float(entry["rate"]), "time": float(entry["time"])}
    return fresh
