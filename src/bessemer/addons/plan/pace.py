"""How fast this machine does the work of a recipe's stages, from seconds of measurement before a run.

Measured with the real trainer and the real engine, once for every network, precision, FP8, optimizer and micro-batch
that a stage trains with, and once for every network that samples. What is too little to matter, too large for this
machine, or of another family is guessed (`guess`). Stages that this machine has run before are corrected by what they
took then (`record`).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bessemer.addons.accelerate import compiling
from bessemer.addons.plan import record
from bessemer.addons.plan.guess import fixed, guessed, of_stage
from bessemer.addons.watch.expected import Expected, ExpectedTime
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
from bessemer.pipeline.work import PROMPT, StageWork
from bessemer.system import memory
from bessemer.tasks.arithmetic import Arithmetic
from bessemer.train import lineage, objective, setup
from bessemer.train.trainer import Trainer

SECONDS = 1.5
"""Of a measurement before a run; two thirds of it count."""
WORTH = 8.0
"""Seconds that a kind of work must be guessed to take in all before its rate is measured."""
LONGEST = 8.0
"""Seconds that the smallest measurement may be guessed to take; beyond them nothing is measured."""
LEARNT, ALIKE = 5.0, 1.25
"""Seconds that a stage must take for this machine to remember it, and how much busier or less busy the machine may then
be than while measured."""
QUIET = 0.9
"""Share of a core's time that a measurement gets on a machine without other work."""
BYTES = 16
"""Of a parameter in training: weights, gradients and two moments in float32."""


class Measured(NamedTuple):
    """What was measured of one kind of work."""

    rate: float
    """Tokens per second of this process's processor time, which other work on the machine does not change."""
    processor: float
    """Processor seconds of this process while it was measured."""
    wall: float
    """Seconds by the clock."""


class Stopwatch:
    """Seconds since it was made. On a GPU the processor's are the clock's."""

    def __init__(self, device: torch.device) -> None:
        self._processor = time.process_time if device.type == "cpu" else time.monotonic
        self._began = time.monotonic(), self._processor()

    def wall(self) -> float:
        return time.monotonic() - self._began[0]

    def processor(self) -> float:
        return self._processor() - self._began[1]


class Pace:
    """Tokens per second on this machine: stages that share what a rate depends on share one measurement."""

    def __init__(
        self, recipe: Recipe, seconds: float = SECONDS, worth: float = WORTH, base: PretrainConfig | None = None,
        ranks: int = 1, say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """`base`: the stage whose network stands for those of other families. `ranks`: of the run; with several
        nothing is measured, and they share what is guessed for one. `say` tells that it measures, before it does."""
        self.recipe, self.seconds, self.worth, self._base, self._ranks = recipe, seconds, worth, base, ranks
        self._say = say
        self._rates = dict[str, float]()
        """Tokens per processor second."""
        self.compiled = False
        self._found: dict[str, float | None] = {}
        self._guesses = dict[str, float]()
        self._both: list[tuple[float, float]] = []
        """Of the measured work: seconds that were guessed, and seconds at the measured rate."""
        self._processor = self._wall = 0.0

    def of_stages(self, stages: Sequence[StageConfig]) -> dict[str, ExpectedTime]:
        """Stage -> the seconds that it is expected to take, and their kinds."""
        work = {stage.name: find_kind(stage.kind)().work(stage, self.recipe) for stage in stages}
        for stage in stages:  # what is worth a measurement depends on the whole run
            for counted in work[stage.name]:
                for kind, part in _parts(counted):
                    key = self._key(kind, stage, counted)
                    self._guesses[key] = self._guesses.get(key, 0.0) + guessed(self.recipe, part)
        seconds = {stage.name: self._seconds(stage, work[stage.name]) for stage in stages}
        measured = 1 / self.share()
        slower = {
            record.TRAINING: measured, record.SAMPLING: measured, record.GUESSED: measured * self._mistaken(),
            record.TEXTS: 1 / (1 - self.busy()),
        }  # fmt: skip
        times = {}
        for name, of in seconds.items():
            of = {cause: took * slower[cause] for cause, took in of.items() if took}
            total, each = sum(of.values()), next((counted.each for counted in work[name] if counted.each), ())
            parts = {cause: took / total for cause, took in of.items()}
            times[name] = ExpectedTime(total, parts, record.OWN, each, PROMPT if each else 0.0)
        return times

    def _seconds(self, stage: StageConfig, work: Sequence[StageWork]) -> dict[str, float]:
        """The stage's seconds, by what their error depends on."""
        seconds = dict.fromkeys(record.CAUSES, 0.0)
        for counted in work:
            seconds[record.TEXTS] += fixed(self.recipe, counted)
            for kind, part in _parts(counted):
                cause, took = self._of_part(stage, kind, part)
                seconds[cause] += took
        return seconds

    def rates(self) -> dict[str, float]:
        """Tokens per second of what was measured."""
        return {name: rate * self.share() for name, rate in self._rates.items()}

    def share(self) -> float:
        """Processor seconds per second while this measured, of one process: 1 less waiting for other work and for the
        other processes of this one."""
        return self._processor / self._wall if self._wall > 0 else 1.0

    def busy(self) -> float:
        """Share of the cores' time that other work took while this measured."""
        return max(0.0, 1 - self.share() / QUIET)

    def _mistaken(self) -> float:
        """How many times longer than guessed the measured work takes."""
        guess = sum(guess for guess, _ in self._both)
        return sum(took for _, took in self._both) / guess if guess > 0 else 1.0

    def _of_part(self, stage: StageConfig, kind: str, part: StageWork) -> tuple[str, float]:
        """What its error depends on, and its seconds."""
        key = self._key(kind, stage, part)
        settings = self._settings(stage, part)
        idle = self._ranks > 1 or (key not in self._found and self._guesses[key] < self.worth)
        if settings is None or idle:
            return record.GUESSED, guessed(self.recipe, part) / self._ranks
        if key not in self._found:
            self._found[key] = None
            # what cannot be measured is guessed; what is wrong with it, the stage itself will say
            with suppress(RuntimeError, UserError):
                self._found[key] = self._measure(kind, stage, settings, self._length(settings))
        if (rate := self._found[key]) is None:
            return record.GUESSED, guessed(self.recipe, part)
        if kind == "decoding":
            cause, seconds = record.SAMPLING, part.sampled / rate
        else:
            cfg = setup.model_config(self.recipe, settings.model)
            cost = flops_per_token(cfg, part.length).training / flops_per_token(cfg, self._length(settings)).training
            cause, seconds = record.TRAINING, (part.trained + part.read / 3) * cost / rate
        self._both.append((guessed(self.recipe, part), seconds))
        return cause, seconds

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
        """Tokens per processor second, or None where measuring would take too long or more memory than there is."""
        cfg, on_gpu = setup.model_config(self.recipe, settings.model), setup.device().type == "cuda"
        room = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory()
        rows = self._rows(stage, settings, length)
        smallest = StageWork(stage.name, sampled=256 * 16) if kind == "decoding" else StageWork(stage.name)
        too_large = BYTES * stored_params(cfg) > room / 2 or not cfg.kv_lora_rank
        if rows is None or too_large or guessed(self.recipe, smallest) > LONGEST:
            return None
        if not self._rates:
            self._say("measuring how fast this machine trains and samples ...")
        setup.keep_memory()
        with torch.random.fork_rng(devices=[0] if on_gpu else []):
            if kind == "decoding":
                dtype = setup.choose_precision(getattr(stage, "precision", "device")).dtype
                measured = decoding_rate(self._network(cfg, None).to_compute(dtype), self.seconds)
            else:
                smaller = settings.model_copy(update={"batch_rows": Points(rows)})
                measured = training_rate(self._network(cfg, settings, length), smaller, length, self.seconds)
        gc.collect()  # a trainer is part of reference cycles; its memory and its workers end now
        if on_gpu:
            torch.cuda.empty_cache()
        metric = f"{kind}_tokens_per_second"
        self._rates[f"{metric}_of_{stage.name}" if metric in self._rates else metric] = measured.rate
        self._processor, self._wall = self._processor + measured.processor, self._wall + measured.wall
        return measured.rate

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


def estimate(
    recipe: Recipe, due: Sequence[StageConfig], cache: Path, n_processes: int, say: Callable[[str], None],
    worth: float | None = None,
) -> Expected:  # fmt: skip
    """What is expected of every stage: at rates measured here, and by what this machine's earlier runs took, for those
    that are `due`."""
    pace = Pace(recipe, worth=WORTH if worth is None else worth, ranks=n_processes, say=say)
    counted, earlier = pace.of_stages(due), record.OfMachine(cache / "stage_times.json", recipe, n_processes)
    stages = {stage.name: counted.get(stage.name) or ExpectedTime(of_stage(stage, recipe)) for stage in recipe.stages}
    corrected = stages | {name: earlier.corrected(name, time) for name, time in counted.items()}

    def learn(name: str, seconds: float, share: float) -> None:
        busier = max(min(1.0, share), 1e-3) / pace.share()
        if seconds >= LEARNT and (not pace.rates() or 1 / ALIKE < busier < ALIKE):
            earlier.add(name, seconds / stages[name].seconds)

    return Expected(corrected, tuple(counted), record.spreads(pace.busy()), learn, round(pace.share(), 3))


def _parts(work: StageWork) -> list[tuple[str, StageWork]]:
    """The work of each kind that has a rate of its own, without its fixed seconds."""
    parts = []
    if work.trained or work.read:
        parts.append(("training", StageWork(work.model, trained=work.trained, read=work.read, length=work.length)))
    if work.sampled:
        parts.append(("decoding", StageWork(work.model, sampled=work.sampled, length=work.length)))
    return parts


def training_rate(model: Transformer, settings: PretrainConfig, length: int, seconds: float) -> Measured:
    """The stage's trainer, on random tokens. Steps in the first third of the time do not count,
    because kernels are then compiled for every number of rows that an expert may get."""
    choice = setup.choose_precision(settings.precision)
    trainer = Trainer(
        model, objective.next_token, None, settings, training_plan(settings, choice.dtype, setup.workers()),
        warn=lambda text: None,
    )  # fmt: skip
    rows = max(1, round(settings.batch_rows(settings.tokens)))
    sizes = [min(settings.micro_rows, rows - first) for first in range(0, rows, settings.micro_rows)]

    def steps(least: int, seconds: float) -> tuple[float, float, float]:
        """Median processor seconds of a step, because other work on the machine comes in bursts; and the seconds of all
        steps, on the processor and on the clock."""
        taken, watch = list[float](), Stopwatch(model.embed.weight.device)
        while len(taken) < least or watch.wall() < seconds:
            before = watch.processor()
            trainer.update(_batch(size, length, model) for size in sizes)
            taken.append(watch.processor() - before)
        return statistics.median(taken), watch.processor(), watch.wall()

    try:
        steps(1, seconds / 3)
        step, processor, wall = steps(2, seconds)
        return Measured(rows * length / step, processor, wall)
    finally:
        trainer.close()


def _batch(rows: int, length: int, model: Transformer) -> Batch:
    tokens = torch.randint(0, model.cfg.vocab_size, (rows, length))
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    return Batch(tokens, loss).to(model.embed.weight.device)


def decoding_rate(model: Transformer, seconds: float) -> Measured:
    """The engine with a batch as large as a rollout's, on all cores. The network is untrained, and
    answers run to their cap."""
    workers = setup.workers()
    task = Arithmetic()
    tokenizer = Tokenizer.train((task.document(i) for i in range(200)), min(400, model.cfg.vocab_size))
    engine = Engine(model, tokenizer, workers)
    assert tokenizer.bos_id is not None, "our own tokenizer has one"
    prompts = [[tokenizer.bos_id, *tokenizer.encode(task.document(i))[:40]] for i in range(16)]
    tokens, done, watch = 16, 0, Stopwatch(model.embed.weight.device)
    while watch.wall() < seconds:
        answers = engine.generate(prompts, samples=16, max_new_tokens=tokens, stop_ids=(), batch_rows=128)
        if tokens == 16 and watch.wall() < seconds / 3:  # the first answers pay for memory and kernels
            watch = Stopwatch(model.embed.weight.device)
        else:
            done += sum(len(answer.tokens) for group in answers for answer in group)
        tokens = min(2 * tokens, model.cfg.max_seq_len - 41)
    return Measured(done / watch.processor(), watch.processor(), watch.wall())
