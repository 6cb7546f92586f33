"""How long a recipe takes on this machine, from a few seconds of measurement (`bessemer plan RECIPE --here`).

Measured: optimizer steps on rows of pre-training, once for every network, precision, FP8, optimizer and micro-batch
that a stage trains with; held-out forward passes and decoding with networks of those shapes. Assumed: the length of
answers (half of their cap) and the time of a corpus stage. If the run exists, planned times are compared with those it
measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bessemer.config.data import CorpusConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig
from bessemer.config.units import show_seconds
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.model.accounting import flops_per_token
from bessemer.model.transformer import Transformer
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.eval import n_answers
from bessemer.pipeline.stages.pretrain import HELDOUT_ROWS, runtime
from bessemer.plan.plan_config import pretraining
from bessemer.precision.fp8_linear import FP8_RECIPES
from bessemer.rl.monitor import SAMPLES, evaluation_tasks
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json
from bessemer.tasks.arithmetic import Arithmetic
from bessemer.train import lineage, objective, setup
from bessemer.train.trainer import Trainer

ANSWER = 0.5
"""Ratio of answers' mean length to `max_new_tokens`."""
CORPUS = 60.0
"""Seconds of a corpus stage: download, tokenizer, packing. Not measured."""


@dataclass(frozen=True)
class LocalEstimate:
    """Predicted seconds by stage, and the measured rates behind them."""

    stages: dict[str, float]
    rates: dict[str, float]
    measured: dict[str, float]
    """Seconds of the stages that a run has finished."""
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        rows = [
            {"stage": name, "planned_seconds": seconds, "measured_seconds": self.measured.get(name)}
            for name, seconds in self.stages.items()
        ]
        return {
            "stages": rows,
            "planned_seconds": sum(self.stages.values()),
            **self.rates,
            "assumptions": list(self.notes),
        }

    def describe(self) -> str:
        """The estimate for a terminal."""
        lines = [f"{'stage':<16}{'planned':>12}{'measured':>12}{'error':>9}"]
        for name, seconds in self.stages.items():
            real = self.measured.get(name)
            measured = "" if real is None else f"{show_seconds(real):>12}{100 * (seconds / real - 1):>+8.0f}%"
            lines.append(f"{name:<16}{show_seconds(seconds):>12}{measured}")
        lines.append(f"{'in all':<16}{show_seconds(sum(self.stages.values())):>12}")
        lines += [f"{name.replace('_', ' ')}: {value:,.0f}" for name, value in self.rates.items()]
        return "\n".join([*lines, *self.notes])


def estimate(recipe: Recipe, seconds: float = 8.0, run: Path | None = None) -> LocalEstimate:
    """`seconds`: of each measurement; `run`: directory to compare with, if it exists. Needs a pre-training stage."""
    settings, _, length = pretraining(recipe, needed_for="--here measures")
    setup.keep_memory()
    rates = _Rates(recipe, settings, length, seconds)
    stages = {stage.name: _stage(stage, recipe, rates) for stage in recipe.stages}
    measured = {}
    for _, name, folder in stage_folders(run) if run is not None and run.is_dir() else ():
        if (done := read_json(folder / "done.json")) is not None:
            measured[name] = done["seconds"]
    notes = (
        f"answers of {100 * ANSWER:.0f} % of their cap; {CORPUS:.0f} s for a corpus, not measured",
        "the machine as busy as it was while measuring" + ("; layers compiled" if rates.compiled else ""),
    )
    return LocalEstimate(stages, rates.shown, measured, notes)


class _Rates:
    """Tokens per second on this machine: stages that share what a rate depends on share one measurement."""

    def __init__(self, recipe: Recipe, first: PretrainConfig, length: int, seconds: float):
        self.recipe, self.first, self.length, self.seconds = recipe, first, length, seconds
        self.shown: dict[str, float] = {}
        self.compiled = False
        self._found: dict[tuple[object, ...], float] = {}

    def base(self, name: str) -> PretrainConfig:
        """The stage whose network the model of `name` has; the first pre-training for an imported one."""
        origin = lineage.origin(self.recipe, name)
        return origin if isinstance(origin, PretrainConfig) else self.first

    def training(self, stage: OptimizerConfig) -> float:
        settings = stage if isinstance(stage, PretrainConfig) else self.base(stage.name)
        own = {key: getattr(stage, key) for key in ("fp8", "precision", "optimizer")}
        settings = settings.model_copy(update=own | ({} if settings is stage else {"compile": "off"}))
        dtype = setup.choose_precision(settings.precision).dtype
        key = (settings.fp8, dtype, settings.micro_rows, settings.optimizer)

        def measure(model: Transformer) -> float:
            return training_rate(model, settings, self.length, self.seconds)

        return self._once("training", stage.name, key, measure, settings)

    def held_out(self, stage: PretrainConfig) -> float:
        def measure(model: Transformer) -> float:
            return _held_out(model, self.length, self.seconds / 3)

        return self._once("held_out", stage.name, (), measure, stage)

    def decoding(self, name: str) -> float:
        return self._once("decoding", name, (), lambda model: _decoding(model, self.seconds))

    def _once(
        self, what: str, name: str, key: tuple[object, ...], measure: Callable[[Transformer], float],
        settings: PretrainConfig | None = None,
    ) -> float:  # fmt: skip
        """The rate of the network of `name`, measured with this `key`; `settings`: of the stage that runs it."""
        cfg = setup.model_config(self.recipe, self.base(name).model)
        if (key := (what, cfg, *key)) not in self._found:
            model = Transformer(cfg).initialise(self.recipe.seed).to(setup.device())
            if settings is not None and settings.fp8 != "off":
                model.set_fp8(FP8_RECIPES[settings.fp8])
            elif settings is not None:
                flops = settings.tokens * flops_per_token(cfg, self.length, mtp=cfg.n_mtp > 0).training
                if setup.want_compile(settings.compile, flops):
                    setup.compile_layers(model)
                    self.compiled = True
            self._found[key] = measure(model)
            shown = f"{what}_tokens_per_second"
            self.shown[f"{shown}_of_{name}" if shown in self.shown else shown] = self._found[key]
        return self._found[key]


def training_rate(model: Transformer, settings: PretrainConfig, length: int, seconds: float) -> float:
    """Tokens per second of the stage's trainer, on random tokens. Steps in the first third of the time do not count,
    because kernels are then compiled for every number of rows that an expert may get."""
    choice = setup.choose_precision(settings.precision)
    trainer = Trainer(
        model, objective.next_token, None, settings, runtime(settings, choice.dtype, setup.workers()),
        warn=lambda text: None,
    )  # fmt: skip
    rows = max(1, round(settings.batch_rows(settings.tokens)))
    sizes = [min(settings.micro_rows, rows - first) for first in range(0, rows, settings.micro_rows)]

    def step() -> None:
        trainer.update(_batch(size, length, model) for size in sizes)

    def steps(least: int, seconds: float) -> float:
        """Median seconds per step, because other work on the machine comes in bursts."""
        taken: list[float] = []
        while len(taken) < least or sum(taken) < seconds:
            began = time.monotonic()
            step()
            taken.append(time.monotonic() - began)
        return statistics.median(taken)

    steps(1, seconds / 3)
    return rows * length / steps(2, seconds)


def _batch(rows: int, length: int, model: Transformer) -> Batch:
    tokens = torch.randint(0, model.cfg.vocab_size, (rows, length))
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    return Batch(tokens, loss).to(model.embed.weight.device)


@torch.no_grad()
def _held_out(model: Transformer, length: int, seconds: float) -> float:
    """Tokens per second of forward passes in one process."""
    model.eval()
    done, began = 0, time.monotonic()
    while done < 1 or time.monotonic() - began < seconds:
        objective.next_token(model, _batch(16, length, model), 0.0, 0.0)
        done += 1
    return done * 16 * length / (time.monotonic() - began)


def _decoding(model: Transformer, seconds: float) -> float:
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
        done += sum(len(one.tokens) for group in answers for one in group)
        if time.monotonic() - began > seconds:
            return done / (time.monotonic() - began)
        tokens = min(2 * tokens, model.cfg.max_seq_len - 41)


def _stage(stage: StageConfig, recipe: Recipe, rates: _Rates) -> float:
    if isinstance(stage, CorpusConfig):
        return CORPUS
    if isinstance(stage, PretrainConfig) and stage.corpus is None:
        evaluations = 1 + (stage.tokens // stage.validate_every if stage.validate_every else 0)
        corpus = recipe.stage(stage.source) if stage.source else None
        parts = stage.mixture or (corpus.parts if isinstance(corpus, CorpusConfig) else ())
        held_out = evaluations * len(parts) * HELDOUT_ROWS * rates.length / rates.held_out(stage)
        return stage.tokens / rates.training(stage) + held_out / setup.workers().n
    if isinstance(stage, RLConfig):
        samples = stage.rollouts * stage.prompts_per_rollout * stage.samples
        evaluations = 2 + stage.rollouts // stage.eval_every
        families = [task for several in evaluation_tasks(stage) for task in several]
        problems = sum(min(task.size("test") or stage.eval_problems, stage.eval_problems) for task in families)
        asked = evaluations * problems * SAMPLES
        mean = ANSWER * sum(stage.max_new_tokens.values) / len(stage.max_new_tokens.values)
        # the log-probabilities of the policy and of the reference each take a forward pass
        passes = 1 + 2 / 3
        return (samples + asked) * mean / rates.decoding(stage.name) + samples * mean * passes / rates.training(stage)
    if isinstance(stage, EvalConfig):
        tokens = sum(n_answers(stage)) * ANSWER * stage.max_new_tokens
        return sum(tokens / rates.decoding(name) for name in stage.models)
    # the initial guess of the progress bar, scaled by its error for training with the stage's settings
    if not (guess := find_kind(stage.kind)().estimate(stage, recipe)):
        return 0.0
    base = rates.base(stage.name)
    rate = rates.training(stage if isinstance(stage, OptimizerConfig) else base)
    return guess / lineage.estimate_seconds(recipe, base.name, rate)
