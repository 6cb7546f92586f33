"""The kinds of stages, and the class of each kind's table.

An add-on brings the table of a stage, or of a recipe of its own kind, as an entry point of the group `bessemer.tables`:
the kind's name, and the class. So a recipe is read, and its keys are listed, before the code that runs it is loaded. A
stage that a recipe names as FILE.py:NAME or package.module:NAME, or one that a package brings without a table of this
name, has its table in `Stage.table`.
"""

import json
from contextlib import suppress

from bessemer import plugins
from bessemer.config.data import CorpusConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.config.rl import RLConfig
from bessemer.config.table import ConfigTable, StageConfig, nearest
from bessemer.config.training import PretrainConfig, SFTConfig
from bessemer.errors import UserError

CORE: dict[str, type[StageConfig]] = {
    "corpus": CorpusConfig,
    "eval": EvalConfig,
    "pretrain": PretrainConfig,
    "rl": RLConfig,
    "sft": SFTConfig,
}


def stage_tables() -> dict[str, type[StageConfig]]:
    """The table of every kind that is installed."""
    tables = CORE | plugins.table("tables")
    stages = {name: table for name, table in tables.items() if issubclass(table, StageConfig)}
    for kind in plugins.names("stages"):
        if kind not in stages:  # only then is the code loaded that runs it
            with suppress(plugins.RemovedAddOn):
                stages[kind] = plugins.find("stages", kind).table
    return dict(sorted(stages.items()))


def recipe_tables() -> dict[str, type[ConfigTable]]:
    """The recipes that add-ons define beside that of a run, such as `data`."""
    return {name: table for name, table in plugins.table("tables").items() if not issubclass(table, StageConfig)}


def stage_config(kind: object, where: str) -> type[StageConfig]:
    """The table of a kind; a UserError that starts with `where` when there is no such kind."""
    if isinstance(kind, str) and kind in CORE:
        return CORE[kind]
    tables = plugins.names("tables")
    if not isinstance(kind, str) or (":" not in kind and kind not in (*tables, *plugins.names("stages"))):
        hint = nearest(str(kind), list(stage_tables()))
        raise UserError(f"{where}: unknown kind {json.dumps(kind, default=str)}; {hint}")
    try:
        plugin = plugins.find("tables", kind) if kind in tables else plugins.find("stages", kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    table = plugin if kind in tables else getattr(plugin, "table", None)
    if not isinstance(table, type) or not issubclass(table, StageConfig):
        raise UserError(f'{where}: "{kind}" is no stage; derive it from Stage[...] with the class of its table')
    return table


def starts_from(kind: object) -> bool:
    """Whether stages of a kind start from the output of another; so do those of kinds that are not known here."""
    try:
        return stage_config(kind, "").starts_from
    except UserError:
        return True
