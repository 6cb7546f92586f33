"""The hook `lm-eval`: rows of lm-eval's tasks, if that library is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bessemer.engine.engine import Engine
from bessemer.errors import UserError


def rows(engine: Callable[[], Engine], names: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """See `lm_eval_model.evaluate`."""
    try:
        from bessemer.addons.evals import lm_eval_model
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError("--lm-eval needs the lm-eval library: pip install 'bessemer[eval]'") from None
    return lm_eval_model.evaluate(engine, names, **options)
