"""Parts of a corpus that are shards already, `shards:FOLDER`: what `bessemer data build` made (the hook `shards`)."""

from pathlib import Path
from typing import Any

from bessemer.config.data import CorpusConfig
from bessemer.config.places import located
from bessemer.data import shards
from bessemer.data.fetch import sha256_of
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.pipeline.inputs import SHARDS


def link(config: CorpusConfig, name: str, target: Path) -> None:
    """Makes `target` a link to the part's shards, with the corpus's row length."""
    shards.link(target, _folder(config, name), config.row_length)


def _folder(config: CorpusConfig, source: str) -> Path:
    return located(config.parts[source].removeprefix(SHARDS))


def _shards(config: CorpusConfig) -> list[str]:
    """The sources that are already shards."""
    return [source for source, spec in config.parts.items() if spec.startswith(SHARDS)]


def identity(config: CorpusConfig) -> dict[str, Any]:
    """The identity of sources that are existing shards: the digest of their meta.json, which holds all checksums."""
    digests = {}
    for source in _shards(config):
        folder = _folder(config, source)
        try:
            shards.read_meta(folder)
            digests[source] = sha256_of(folder / "meta.json")
        except UserError as error:
            raise UserError(f'stage "{config.name}": part "{source}": {error} with bessemer data build') from None
    return {"shards": digests}


def tokenizer(config: CorpusConfig) -> Tokenizer | None:
    """The tokenizer of all of them."""
    common = None
    for source in _shards(config):
        folder = _folder(config, source)
        loaded = load_tokenizer(folder.parent / "tokenizer")
        if shards.read_meta(folder)["tokenizer"] != loaded.fingerprint or (
            common is not None and common.fingerprint != loaded.fingerprint
        ):
            raise UserError(
                f'stage "{config.name}": the shards of "{source}" were made with another tokenizer than '
                f"{folder.parent / 'tokenizer'} or the other parts; build all of them with one"
            )
        common = loaded
    return common
