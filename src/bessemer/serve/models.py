"""The models a server offers: every finished writing model of a run by the name of its stage, or one directory.

The last one is the default. A model is loaded when it is first asked for; when more than `Settings.loaded` would be in
memory, one that nobody uses makes room.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.runs.directory import model_dir, stage_folders, writing_models
from bessemer.serve.errors import ApiError
from bessemer.serve.facts import Facts, read
from bessemer.serve.service import Launch, Service, launch
from bessemer.serve.settings import Settings
from bessemer.serve.text import Vocabulary


@dataclass(eq=False)
class Loaded:
    """A model in memory."""

    facts: Facts
    service: Service
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    stop_ids: tuple[int, ...]
    """What ends an answer."""
    users: int = 0
    """Requests that are about to ask it."""


class Models:
    """Made by `offered`."""

    def __init__(
        self, offers: list[Facts], settings: Settings, broken: list[str] | None = None, launch: Launch = launch
    ):
        """`launch` starts a model's worker."""
        self.offers, self.settings = {facts.name: facts for facts in offers}, settings
        self.broken = broken or []
        """Why other models of the run are not offered."""
        self.launch = launch
        self.loaded: dict[str, Loaded] = {}
        self._locks = {name: asyncio.Lock() for name in self.offers}

    @property
    def default(self) -> Facts:
        return list(self.offers.values())[-1]

    def preload(self) -> None:
        """Loads the default model; UserError now rather than in an answer later."""
        self.loaded[self.default.name] = self._load(self.default)

    def start(self) -> None:
        """On the event loop, before the first request."""
        for model in self.loaded.values():
            model.service.start()

    async def stop(self) -> None:
        await asyncio.gather(*(model.service.stop() for model in self.loaded.values()))
        self.loaded.clear()

    def abort(self, message: str) -> None:
        """Every answer under way ends with an error."""
        for model in self.loaded.values():
            model.service.abort(message)

    def find(self, name: str | None) -> Facts:
        """The model a request means: by its id, or by the path of its directory."""
        if name is None:
            return self.default
        if name in self.offers:
            return self.offers[name]
        for facts in self.offers.values():
            if name.rstrip("/") in (str(facts.folder), str(facts.folder.resolve())):
                return facts
        near = difflib.get_close_matches(name, self.offers, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"this server has {', '.join(self.offers)}"
        raise ApiError(404, f"there is no model {name!r}; {hint}", param="model", code="model_not_found")

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Loaded]:
        """The model, in memory and staying there for the length of the block."""
        facts = self.find(name)
        async with self._locks[facts.name]:
            model = self.loaded.get(facts.name)
            if model is None or not model.service.alive:
                await self._make_room(facts.name)
                try:
                    model = await asyncio.to_thread(self._load, facts)
                except UserError as error:
                    why = f"the model {facts.name!r} cannot be loaded: {error}"
                    raise ApiError(503, why, code="model_unavailable") from error
                model.service.start()
                self.loaded[facts.name] = model
            model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    def _load(self, facts: Facts) -> Loaded:
        tokenizer = load_tokenizer(facts.folder)
        service = Service(facts.folder, self.settings, self.launch)
        ends = dict.fromkeys((*tokenizer.stop_ids, *facts.end_ids))
        known = tuple(i for i in ends if i < tokenizer.vocab_size)
        facts = replace(facts, context=service.facts.context)
        return Loaded(facts, service, tokenizer, Vocabulary(tokenizer), known)

    async def _make_room(self, name: str) -> None:
        self.loaded.pop(name, None)
        while len(self.loaded) >= self.settings.loaded:
            idle = [m for m in self.loaded.values() if not m.users and not m.service.figures.open]
            if not idle:
                why = f"{len(self.loaded)} models are in memory and all at work; try again later"
                raise ApiError(429, why, code="models_busy", headers={"Retry-After": "5"})
            oldest = min(idle, key=lambda m: m.service.used)
            del self.loaded[oldest.facts.name]
            await oldest.service.stop()


def offered(given: str | Path, settings: Settings, name: str | None = None, launch: Launch = launch) -> Models:
    """The models of a run, a stage or a directory; `name` renames a single one."""
    for path in (Path(given), Path("runs") / given):
        if (path / "recipe.toml").is_file():
            if name is not None:
                raise UserError(f"{given} is a run: its models go by the names of their stages; leave the name out")
            return _of_run(given, path, settings, launch)
    folder = model_dir(given)
    return Models([read(name or _name(folder), folder)], settings, launch=launch)


def _of_run(given: str | Path, root: Path, settings: Settings, launch: Launch) -> Models:
    offers, broken = [], []
    for stage, folder in writing_models(root):
        try:
            offers.append(read(stage, folder / "model"))
        except UserError as error:
            broken.append(str(error))
    if not offers:
        model_dir(given)  # says what is there instead
        raise UserError(f"no model of {root} can be served: {broken[0]}")
    return Models(offers, settings, broken, launch)


def _name(folder: Path) -> str:
    """The stage's name for a model in a run, else the directory's, or its parent's where that says only "model"."""
    folder = folder.resolve()
    for _, stage, path in stage_folders(folder.parent.parent) if folder.name == "model" else ():
        if path == folder.parent:
            return stage
    name = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^\w.-]+", "-", name) or "model"
