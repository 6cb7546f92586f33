"""Where a stage runs: in this process alone, or in this and others together.

The runner gives every stage a `Runtime`. The stage asks it for its network, its trainer and its output, and never how
many processes there are. That of many ranks, which comes with distributed training, derives from that of one; all ranks
run the stage and make the same calls in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bessemer.hf.model_directory import load_scorer, read_into
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Transformer
from bessemer.train import setup
from bessemer.train.collective import outputs_of
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.config.rl import RLConfig
    from bessemer.config.table import Precision
    from bessemer.data.batch import Batch
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.model.config import ModelConfig
    from bessemer.tasks import Task
    from bessemer.train.collective import Outputs, Read

_Made = TypeVar("_Made")


class Share(NamedTuple):
    """This process's part of work that all processes have: item i is that of process i % n. `merge` collects what each
    found, by item, on all of them; collective."""

    me: int = 0
    n: int = 1
    merge: Callable[[dict[Any, Any]], dict[Any, Any]] = lambda own: own


ALONE = Share()


class Whole:
    """The whole network that a trainer trains: in this process, to sample from and to compare with, or tensor by
    tensor, for a sampler elsewhere."""

    def __init__(self, model: LanguageModel) -> None:
        self._source, self.model = model, model.sampled()
        """Its weights are there after a `refresh`, until a `release`."""

    def refresh(self) -> None:
        """Copies the current weights, if they are elsewhere. Collective."""
        self._source.sampled()

    def release(self) -> None:
        """Gives the memory of the weights back until the next `refresh`, if they are a copy of some elsewhere."""

    def weights(self, receivers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The current weights in these processes (None: in all), without those that are never trained: name and tensor,
        in the order of the state dict. A tensor may change when the next one comes. Collective: all exhaust it."""
        self._source.sampled()
        frozen = self.model.frozen()
        yield from ((name, tensor) for name, tensor in self.model.state_dict().items() if name not in frozen)

    def rounded(self, trainer: Trainer, dtype: torch.dtype, workers: Workers) -> Whole:
        """The same network in another dtype, for sampling."""
        return RoundedModel(self, trainer, dtype, workers)


class RoundedModel(Whole):
    """A copy of the network in another dtype, for sampling, next to the trained one."""

    def __init__(self, policy: Whole, trainer: Trainer, dtype: torch.dtype, workers: Workers) -> None:
        super().__init__(copy.deepcopy(policy.model).requires_grad_(False).to_compute(dtype))
        self._policy, self._trainer, self._copied_at = policy, trainer, -1
        workers.share(self.model.state_dict().values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the current weights. Collective."""
        if self._copied_at != self._trainer.rows:  # every update counts its rows
            own = self.model.state_dict()
            for name, exact in self._policy.weights():
                own[name].copy_(exact)
            self._copied_at = self._trainer.rows

    def weights(self, receivers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        own = self.model.state_dict()
        for name, exact in self._policy.weights(receivers):
            yield name, exact.to(own[name].dtype)


class Frozen:
    """Frozen networks that read a trained one's batches, such as teachers; here whole, in the process that trains."""

    def __init__(self, networks: Iterable[LanguageModel]) -> None:
        self.networks = tuple(networks)
        """For the objective; empty in processes that compute no loss."""

    def read(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This process's micro-batches of a step, with the hidden states of the network that `Batch.teacher` counts,
        unless the objective asks the network itself. Collective; all processes pass the same batches."""
        return batches


class FrozenCopy:
    """A frozen copy of a trained network, such as the reference of a divergence; here whole, in the process that
    trains. It shares what the network itself never trains, such as the weights under adapters."""

    def __init__(self, trainer: Trainer, read: Read) -> None:
        self.trainer, self._read = trainer, read
        self.model = self._copy()
        own = (*self.model.parameters(), *self.model.buffers())
        shared = {id(parameter) for parameter in self.shared.values()}
        trainer.plan.workers.share(tensor for tensor in own if id(tensor) not in shared)

    @property
    def shared(self) -> Mapping[str, torch.nn.Parameter]:
        return self.trainer.model.frozen()

    def _copy(self) -> LanguageModel:
        memo = {id(parameter): parameter for parameter in self.shared.values()}
        return copy.deepcopy(self.trainer.model, memo).eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """What it does not share, by name."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.shared}

    @torch.no_grad()
    def set(self, state: Mapping[str, Tensor]) -> None:
        own = self.state()
        assert own.keys() <= state.keys(), own.keys() - state.keys()
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def follow(self) -> None:
        """Copies the trained weights."""
        self.trainer.optimizer.settle()
        self.set(self.trainer.model.state_dict())

    def load(self, folder: Path) -> None:
        """Takes the weights of a model directory. Collective, as is `save`."""
        read_into(self.model, folder)

    def save(self, folder: Path) -> None:
        self.model.save(folder)

    def outputs(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """`read` of each of this process's micro-batches after a forward pass without MTP; None where another process
        computes its loss. Collective."""
        return list(self.trainer.plan.workers.map(self._output, batches))

    @torch.no_grad()
    def _output(self, batch: Batch) -> Tensor:
        batch = batch.to(setup.device())
        out = self.model.train_outputs(batch.tokens_BT, batch.segments, mtp=False)
        return self._read(out, self.model.head_weight, batch)


class SampleCarrier(Protocol):
    """Brings samples from the processes that generated them to those that train them. Collective."""

    def holders(self, completions: Sequence[Any]) -> list[int]:
        """The process that has each sample."""
        ...

    def batches(
        self, samples: Sequence[Any], parts: Sequence[Sequence[Any]], make: Callable[[Any, Any], Batch]
    ) -> list[Batch]:
        """This process's micro-batches of a mini-batch of `samples` in `parts`, which are lists of rows of samples.
        `make(rows, part)` makes one. The samples that they need are filled."""
        ...


class Runtime:
    """Everything a stage does that depends on the number of processes; this is the runtime of one."""

    me: int = 0
    """The number of this process; process 0 writes the stage's output."""
    n: int = 1
    """Processes that run the stage."""
    generators: int = 1
    """Processes that generate what an engine of `dealt` is asked for."""

    def working(self) -> AbstractContextManager[object]:
        """To be entered while the stage runs."""
        return nullcontext()

    def announce(self, stage: dict[str, Any]) -> None:
        """Called by the runner, in process 0, before the stage begins: the others begin it too."""

    def agree(self, decide: Callable[[], _Made]) -> _Made:
        """What `decide` returns in process 0 (plain JSON), in all processes."""
        return decide()

    def once(self, make: Callable[[], _Made], what: str) -> _Made:
        """Like `agree`, for any picklable result. `what`: what the others wait for, for an error."""
        return make()

    def share(self, what: str) -> Share:
        return ALONE

    def workers(self) -> Workers:
        """The helper processes of this one."""
        return setup.workers()

    def check(self, recipe: Recipe, stage: str, rows: Iterable[float]) -> None:
        """UserError if a step of that many rows cannot be divided over the processes."""

    def fresh(self, cfg: ModelConfig, seed: int) -> Transformer:
        """A randomly initialised network; its weights do not depend on the number of processes."""
        return Transformer(cfg).initialise(seed).to(setup.device())

    def read(
        self, folder: Path, context: Mapping[str, Any] | None = None, split_rows: bool = True, mtp: bool = True
    ) -> tuple[LanguageModel, Tokenizer]:
        """(network, tokenizer) of a model directory. `context`: as in `deepseek.open_directory`. `split_rows` False:
        rows may have any length, so they are not divided over processes. `mtp` False leaves out the MTP modules."""
        return setup.load_model(folder, context, mtp=mtp)

    def scorer(self, folder: Path, new_head: int | None) -> LanguageModel:
        """A reward model: the one in a directory, or with `new_head`, a seed, the body of its language model under a
        new head. Rows are not divided, because a pair's two scores are compared."""
        if new_head is None:
            return load_scorer(folder, torch.float32, setup.device())
        model, _ = setup.load_model(folder)
        return model.scorer(new_head)

    def layers(self, model: LanguageModel) -> list[torch.nn.Module]:
        """What may be compiled, because it is called whole: layers and MTP modules; [] if nothing is."""
        return [*model.layers, *model.mtp]

    def trainer(self, model: LanguageModel, *arguments: Any, **options: Any) -> Trainer:
        """The `Trainer` of a network that this runtime made; arguments as there."""
        return Trainer(model, *arguments, **options)

    def frozen(self, folders: Mapping[str, Path], beside: LanguageModel) -> Frozen:
        """The networks of model directories, by name, in BF16 on a GPU; `beside`: the network that is trained."""
        return Frozen(setup.load_frozen(folder) for folder in folders.values())

    def frozen_copy(self, trainer: Trainer, read: Read) -> FrozenCopy:
        """A frozen copy of the network as it is now, divided as that is. Collective."""
        return FrozenCopy(trainer, read)

    def reward_model(self, folder: Path) -> Outputs:
        """What reads the outputs of the reward model in a directory, which is frozen, and in BF16 on a GPU. Collective,
        as is what it returns."""
        return outputs_of(load_scorer(folder, setup.choose_precision("device").dtype, setup.device()))

    def whole(self, trainer: Trainer) -> Whole:
        whole, trained = Whole(trainer.model), {id(parameter) for parameter in trainer.model.parameters()}
        trainer.plan.workers.share(own for own in whole.model.parameters() if id(own) not in trained)
        return whole

    def gather(self, trainer: Trainer) -> LanguageModel | None:
        """The whole network in process 0, to sample from; None in the others. Collective."""
        return trainer.model.sampled()

    def save(
        self, trainer: Trainer, directory: Path, tokenizer_dir: Path, kind: Literal["model", "ema"] = "model",
        files: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Writes the trained network, or with kind "ema" its moving average, as a Hugging Face directory, with further
        text `files` by name."""
        trainer.finish()  # reports a failed save before the model is there
        with trainer.optimizer.averaged() if kind == "ema" else nullcontext():
            trainer.model.save(directory, tokenizer_dir=tokenizer_dir, files=files)

    def generate(self, engine: Any, prompts: Sequence[Any], apart: bool = False, **options: Any) -> Any:
        """`Engine.generate`, divided over the processes, whose engines have the same weights; all get all samples.
        `apart`: samples stay where they were generated, and the others know what `apart.held_by` says."""
        return engine.generate(prompts, **options)

    def carrier(self, trainer: Trainer, settings: RLConfig, tasks: Sequence[Task]) -> SampleCarrier | None:
        """What trains an RL stage's samples though they stay where they were generated; None: all processes get all
        samples. Collective."""
        return None

    def dealt(
        self, engine: Any, folder: Path, role: str = "model", version: Callable[[], int] | None = None,
        precision: Precision = "device",
    ) -> Any:  # fmt: skip
        """`engine`, which runs the model in `folder`, or one like it that also uses processes that wait for this stage.
        They keep one model per `role`. `version()` differs after every change of the weights; None: they stay."""
        return engine

    def led(self, make: Callable[[Runtime], object]) -> None:
        """Runs `make` in process 0 alone; it gets the runtime to do so with. A UserError or a stop is raised in all
        processes."""
        make(self)
