"""How long a recipe takes on this machine, from a few seconds of measurement (`bessemer plan RECIPE --here`).

Measured: optimizer steps of pre-training, held-out forward passes, and decoding with a network of that shape. Assumed:
the length of answers (half of their cap) and the time of a corpus stage. If the run exists, planned times are compared
with those it measured.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bessemer.config.data import CorpusConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import PretrainConfig
from bessemer.config.units import show_seconds
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.model.accounting import flops_per_token
from bessemer.model.transformer import Transformer
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.eval import n_problems
from bessemer.pipeline.stages.pretrain import HELDOUT_ROWS, runtime
from bessemer.plan.plan_config import pretraining
from bessemer.precision.fp8_linear import FP8_RECIPES
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json
from bessemer.tasks.arithmetic import Arithmetic
from bessemer.train import objective, setup
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
    settings, cfg, length = pretraining(recipe, needed_for="--here measures")
    model = Transformer(cfg).initialise(recipe.seed).to(setup.device())
    if settings.fp8 != "off":
        model.set_fp8(FP8_RECIPES[settings.fp8])
    setup.keep_memory()
    flops = settings.tokens * flops_per_token(cfg, length, mtp=cfg.n_mtp > 0).training
    compiled = settings.fp8 == "off" and setup.want_compile(settings.compile, flops)
    if compiled:
        setup.compile_layers(model)
    rates = {"training_tokens_per_second": training_rate(model, settings, length, seconds)}
    rates["held_out_tokens_per_second"] = _held_out(model, length, seconds / 3)
    if any(stage.kind in ("rl", "eval", "reject") for stage in recipe.stages):
        rates["decoding_tokens_per_second"] = _decoding(model, seconds)
    stages = {stage.name: _stage(stage, recipe, rates, length) for stage in recipe.stages}
    measured = {}
    for _, name, folder in stage_folders(run) if run is not None and run.is_dir() else ():
        if (done := read_json(folder / "done.json")) is not None:
            measured[name] = done["seconds"]
    notes = (
        f"answers of {100 * ANSWER:.0f} % of their cap; {CORPUS:.0f} s for a corpus, not measured",
        "the machine as busy as it was while measuring" + ("; layers compiled" if compiled else ""),
    )
    return LocalEstimate(stages, rates, measured, notes)


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


def _stage(stage: StageConfig, recipe: Recipe, rates: dict[str, float], length: int) -> float:
    train, decode = rates["training_tokens_per_second"], rates.get("decoding_tokens_per_second", 1.0)
    if isinstance(stage, CorpusConfig):
        return CORPUS
    if isinstance(stage, PretrainConfig) and stage.corpus is None:
        evaluations = 1 + stage.tokens // stage.validate_every
        held_out = evaluations * len(stage.mixture) * HELDOUT_ROWS * length / rates["held_out_tokens_per_second"]
        return stage.tokens / train + held_out / setup.workers().n
    if isinstance(stage, RLConfig):
        samples = stage.rollouts * stage.prompts_per_rollout * stage.samples
        evaluations = 2 + stage.rollouts // stage.eval_every
        asked = evaluations * stage.eval_problems * 4 * len(stage.tasks)
        mean = ANSWER * sum(stage.max_new_tokens.values) / len(stage.max_new_tokens.values)
        # the log-probabilities of the policy and of the reference each take a forward pass
        return (samples + asked) * mean / decode + samples * mean * (1 + 2 / 3) / train
    if isinstance(stage, EvalConfig):
        answers = len(stage.models) * len(stage.temperatures) * n_problems(stage) * stage.samples
        return answers * ANSWER * stage.max_new_tokens / decode
    # the initial guess of the progress bar, scaled by its error for pre-training
    guess = find_kind(stage.kind)().estimate(stage, recipe)
    return guess / setup.estimate_seconds(recipe, train)
