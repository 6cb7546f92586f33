"""The kinds of stage, each with the class of its table."""

import json

from bessemer.config.data import CorpusConfig, ExamplesConfig, ImportConfig, RejectConfig
from bessemer.config.evaluation import EvalConfig, LongEvalConfig
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig, nearest
from bessemer.config.training import DistillConfig, ExtendConfig, PretrainConfig, RewardModelConfig, SFTConfig
from bessemer.errors import UserError

STAGES: dict[str, type[StageConfig]] = {
    "corpus": CorpusConfig,
    "distill": DistillConfig,
    "eval": EvalConfig,
    "examples": ExamplesConfig,
    "extend": ExtendConfig,
    "import": ImportConfig,
    "longeval": LongEvalConfig,
    "pretrain": PretrainConfig,
    "reject": RejectConfig,
    "reward-model": RewardModelConfig,
    "rl": RLConfig,
    "sft": SFTConfig,
}
"""Kind -> the class of its table; the code that runs it is in `pipeline/stages/`."""


def stage_config(kind: object, where: str) -> type[StageConfig]:
    """The table of a kind; a UserError that starts with `where` when there is no such kind."""
    if not isinstance(kind, str) or kind not in STAGES:
        raise UserError(f"{where}: unknown kind {json.dumps(kind, default=str)}; {nearest(str(kind), list(STAGES))}")
    return STAGES[kind]
