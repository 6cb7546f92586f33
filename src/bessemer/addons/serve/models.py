"""The models that a server offers: every finished language model of a run under its stage's name, or one directory.

The last one is the default. A model is loaded when it is first requested; when more than `ServeConfig.loaded` would be
in memory, an idle one makes room. What /v1/models reports is read from a model's directory without loading it.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from bessemer.addons.families.named_models import model_dir
from bessemer.addons.families.text_limits import longest_text
from bessemer.addons.serve import ServeConfig, trained_on
from bessemer.addons.serve.digest import digest
from bessemer.addons.serve.protocol import ApiError
from bessemer.addons.serve.service import Launch, Service, launch
from bessemer.addons.serve.trained_on import Practice
from bessemer.data import chat
from bessemer.data.chat import THINK, THINK_END
from bessemer.data.model_files import read_object, read_text
from bessemer.data.tokenizer import MAX_IDS, Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import own_config
from bessemer.hf.safetensors_reader import Checkpoint
from bessemer.model import accounting
from bessemer.runs.directory import stage_folders, writing_models

T = TypeVar("T")
LONG_TEXT = 20_000
"""Characters or tokens above which a text is tokenised outside the event loop's thread."""
NUMBER = (int, float)
GENERATION: dict[str, type | tuple[type, ...]] = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
}
"""Keys of generation_config.json that are used, and their types."""


@dataclass(frozen=True)
class ModelFacts:
    """One model that the server offers."""

    name: str
    """The `model` of a request."""
    folder: Path
    """Its Hugging Face directory."""
    created: int
    """Unix time of its config.json."""
    architecture: str
    parameters: int
    """Those of the model without its MTP modules."""
    active_parameters: int | None
    """Parameters that one token uses; None if only transformers can tell."""
    context: int
    """Tokens of prompt and answer together."""
    thinks: bool
    """Its vocabulary has <think> and </think>."""
    style: Literal["r1", "r1-zero", "zero", "own"] | None
    """Its chat template: one of Bessemer's, one of its own, or none."""
    layers: int
    digest: str = ""
    """What its files hold, by `hf.digest`."""
    sparse_layers: int = 0
    """Layers with routed experts, whose choices can be reported."""
    experts: int = 0
    experts_per_token: int = 0
    mtp_parameters: int = 0
    """Those of the MTP modules, which only draft tokens."""
    dtype: str | None = None
    """Number format of its arithmetic; None until it is loaded."""
    own_context: int = 0
    """`context` as the model's files give it, once loaded: the cache may have shortened it."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults of its generation_config.json."""
    end_ids: tuple[int, ...] = ()
    """End-of-answer tokens that generation_config.json names."""
    bad_end_ids: tuple[str, ...] = ()
    """What it names as such that is no id."""
    practice: Practice = field(default_factory=Practice)
    """What it was trained on, according to the records of its run."""


def read_facts(name: str, folder: Path) -> ModelFacts:
    """The facts of a model directory. Raises UserError if something is missing or broken."""
    created = int((folder / "config.json").stat().st_mtime)
    common: dict[str, Any] = dict(
        name=name, folder=folder, created=created, practice=trained_on.of_model(folder), digest=digest(folder),
        **_template(folder), **_generation(folder),
    )  # fmt: skip
    if (cfg := own_config(folder)) is None:
        config = read_object(folder / "config.json")
        config |= config.get("text_config") or {}
        return ModelFacts(
            architecture=str(config.get("model_type")),
            parameters=sum(math.prod(entry.shape) for entry in Checkpoint(folder).entries.values()),
            active_parameters=None,
            context=longest_text(config) or 0,
            layers=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
            **common,
        )
    sparse = cfg.n_layers - cfg.n_dense_layers
    return ModelFacts(
        architecture=str(read_object(folder / "config.json").get("model_type")),
        parameters=accounting.main_params(cfg),
        active_parameters=accounting.active_params(cfg),
        mtp_parameters=accounting.mtp_params(cfg),
        context=cfg.max_seq_len,
        layers=cfg.n_layers,
        sparse_layers=sparse,
        experts=cfg.n_routed_experts if sparse else 0,
        experts_per_token=cfg.n_activated_experts if sparse else 0,
        **common,
    )


def _template(folder: Path) -> dict[str, Any]:
    config = read_object(folder / "tokenizer_config.json")
    added = {token.get("content") for token in read_object(folder / "tokenizer.json").get("added_tokens", [])}
    path, named = folder / "chat_template.jinja", config.get("chat_template")
    named = json.dumps(named) if isinstance(named, list) else named if isinstance(named, str) else ""
    template = read_text(path) if path.exists() else named
    style = chat.style_of(template) or ("own" if template else None)
    return {"thinks": {THINK, THINK_END} <= added, "style": style}


def _generation(folder: Path) -> dict[str, Any]:
    """Defaults from generation_config.json; none if it is missing or broken."""
    try:
        advice = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(advice, dict):
        return {}
    values = {key: advice.get(key) for key in GENERATION if not isinstance(advice.get(key), bool)}
    sampling = {key: value for key, value in values.items() if isinstance(value, GENERATION[key])}
    if advice.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    ends = advice.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    valid = [type(end) is int and 0 <= end < MAX_IDS for end in ends]
    return {
        "sampling": sampling,
        "end_ids": tuple(end for end, is_id in zip(ends, valid, strict=True) if is_id),
        "bad_end_ids": tuple(str(end)[:40] for end, is_id in zip(ends, valid, strict=True) if not is_id),
    }


class Vocabulary:
    """Converts between text and tokens: ids of a raw prompt, token names in `logprobs`. Built once per model."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        specials = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
        specials += tokenizer.tool_marks.values()
        self._control = {tokenizer.token_bytes(i).decode("utf-8", "replace"): i for i in specials}
        names = sorted(filter(None, self._control), key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        """Bytes of the longest token: a text of N bytes has at least N / longest tokens."""
        self.name = lru_cache(maxsize=1 << 16)(self._name)
        """A token as `logprobs` shows it; "bytes:\\xe4\\xbd" for bytes that are not text on their own."""

    def prompt_ids(self, text: str, begin: bool = True) -> list[int]:
        """The ids of a raw prompt. Its author writes the turns, so names of control tokens become these tokens.
        `begin`: BOS comes first, exactly once, if the model's training documents had it."""
        text = self.tokenizer.trimmed(text)
        ids: list[int] = []
        for piece in filter(None, self._names.split(text)):
            if piece in self._control:
                ids.append(self._control[piece])
            else:
                ids += self.tokenizer.encode(piece, ids[-1] if ids else None)
        bos = self.tokenizer.bos_id
        return [bos, *ids] if begin and bos is not None and ids[:1] != [bos] else ids

    def text(self, token_id: int) -> bytes:
        """The visible bytes of a token: none for a control token."""
        return b"" if self.tokenizer.is_special(token_id) else self.tokenizer.token_bytes(token_id)

    def _name(self, token_id: int) -> str:
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(eq=False)
class LoadedModel:
    """A model in memory."""

    facts: ModelFacts
    service: Service
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    users: int = 0
    """Requests being prepared for it."""
    _long_texts: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def tokenise(self, encode: Callable[[], T], characters: int, renders: bool = False) -> T:
        """Returns `encode()`, which tokenises `characters` characters (or decodes as many tokens). Long texts run in a
        thread, one at a time, so that they do not block the event loop or fill the memory together. So do conversations
        that a template of the model's own `renders`: it may take as long as it likes."""
        if characters < LONG_TEXT and not (renders and self.facts.style == "own"):
            return encode()
        async with self._long_texts:
            return await asyncio.to_thread(encode)

    def check_length(self, characters: int, param: str) -> None:
        """Raises ApiError for a text too long to fit the context in any tokenisation, without tokenising it."""
        least = characters // self.vocabulary.longest
        if least > self.facts.context:
            raise self.too_long(f"more than {least}", param)

    def too_long(self, tokens: int | str, param: str) -> ApiError:
        """For a prompt that leaves no room for an answer. A text that is only scored must fit as well: it fills no
        cache, but its forward pass takes about as much memory."""
        context, own = self.facts.context, self.facts.own_context
        more = f", or give the server more --cache-tokens: the model itself has {own}" if own > context else ""
        message = (
            f"the prompt has {tokens} tokens, and this model's context of {context} must hold prompt and answer; "
            f"shorten the prompt{more}"
        )
        return ApiError(400, message, param=param, code="context_length_exceeded")


class Models:
    """The models of one server; `find_models` builds it."""

    def __init__(
        self, offers: list[ModelFacts], config: ServeConfig, broken: list[str] | None = None, launch: Launch = launch
    ):
        """`launch` starts a model's worker."""
        self.offers, self.config = {facts.name: facts for facts in offers}, config
        self.broken = broken or []
        """Why other models of the run are not offered."""
        self.launch = launch
        self.run: Path | None = None
        """The run that the models belong to, if any."""
        self.loaded: dict[str, LoadedModel] = {}
        self._loading: set[str] = set()
        """Models that are being loaded; each has a place among the loaded ones."""
        self._locks = {name: asyncio.Lock() for name in self.offers}

    @property
    def default(self) -> ModelFacts:
        return list(self.offers.values())[-1]

    def preload(self) -> None:
        """Loads the default model, so that a UserError is raised now and not during an answer."""
        self.loaded[self.default.name] = self._load(self.default)

    def start(self) -> None:
        """Called on the event loop, before the first request."""
        for model in self.loaded.values():
            model.service.start()

    async def stop(self) -> None:
        await asyncio.gather(*(model.service.stop() for model in self.loaded.values()))
        self.loaded.clear()

    @property
    def rounding(self) -> str | None:
        """A warning if a loaded model's tokens may depend on the batch."""
        if self.config.batch_invariant:
            return None
        coarse = {m.facts.dtype for m in self.loaded.values()} - {"float32", None}
        if not coarse:
            return None
        return (
            f"the model computes in {' and '.join(sorted(map(str, coarse)))}: the same seed may give other tokens in "
            "another batch; float32 models keep theirs, and so do all with --batch-invariant"
        )

    def abort(self, message: str) -> None:
        """Ends every unfinished answer with an error."""
        for model in self.loaded.values():
            model.service.abort(message)

    def find(self, name: str | None) -> ModelFacts:
        """The requested model, by its id or its directory's path; raises ApiError if there is none."""
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
    async def use(self, name: str | None) -> AsyncIterator[LoadedModel]:
        """Loads the model if necessary and keeps it in memory for the duration of the block."""
        facts = self.find(name)
        async with self._locks[facts.name]:
            model = self.loaded.get(facts.name)
            if model is None or not model.service.alive:
                self._loading.add(facts.name)
                try:
                    await self._make_room(facts.name)
                    model = await asyncio.to_thread(self._load, facts)
                except UserError as error:
                    why = f"the model {facts.name!r} cannot be loaded: {error}"
                    raise ApiError(503, why, code="model_unavailable") from error
                finally:
                    self._loading.discard(facts.name)
                model.service.start()
                self.loaded[facts.name] = model
            model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    def _load(self, facts: ModelFacts) -> LoadedModel:
        tokenizer = load_tokenizer(facts.folder)
        service = Service(facts.folder, self.config, self.launch)
        ends = dict.fromkeys((*tokenizer.stop_ids, *facts.end_ids))
        known = tuple(i for i in ends if i < tokenizer.vocab_size)
        if bad := [*facts.bad_end_ids, *(str(i) for i in ends if i >= tokenizer.vocab_size)]:
            file = facts.folder / "generation_config.json"
            why = f"eos_token_id {', '.join(bad)} is no token of {tokenizer.vocab_size}"
            print(f"warning: {file}: {why}; correct it", file=sys.stderr, flush=True)
        served = service.facts
        facts = replace(facts, context=served.context, own_context=facts.context, dtype=served.dtype)
        return LoadedModel(facts, service, tokenizer, Vocabulary(tokenizer), known)

    async def _make_room(self, name: str) -> None:
        self.loaded.pop(name, None)
        while len(self.loaded) + len(self._loading) > self.config.loaded:
            idle = [m for m in self.loaded.values() if not m.users and not m.service.stats.open]
            if not idle:
                why = f"{self.config.loaded} models are in memory or being loaded, and all are busy; try again later"
                raise ApiError(429, why, code="models_busy", headers={"Retry-After": "5"})
            oldest = min(idle, key=lambda m: m.service.last_used)
            del self.loaded[oldest.facts.name]
            await oldest.service.stop()


def find_models(source: str | Path, config: ServeConfig, name: str | None = None, launch: Launch = launch) -> Models:
    """The models of a run, a stage or a directory; `name` renames a single one."""
    for path in (Path(source), Path("runs") / source):
        if (path / "recipe.toml").is_file():
            if name is not None:
                raise UserError(f"{source} is a run: its models go by the names of their stages; leave the name out")
            offers, broken = [], []
            for stage, folder in writing_models(path):
                try:
                    offers.append(read_facts(stage, folder / "model"))
                except UserError as error:
                    broken.append(str(error))
            if not offers:
                model_dir(source)  # raises if the run has no model at all
                raise UserError(f"no model of {path} can be served: {broken[0]}")
            models = Models(offers, config, broken, launch)
            models.run = path
            return models
    folder = model_dir(source)
    return Models([read_facts(name or _name(folder), folder)], config, launch=launch)


def _name(folder: Path) -> str:
    """The stage's name for a model in a run, else the directory's name, or its parent's if that is just "model"."""
    folder = folder.resolve()
    for _, stage, path in stage_folders(folder.parent.parent) if folder.name == "model" else ():
        if path == folder.parent:
            return stage
    name = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^\w.-]+", "-", name) or "model"
