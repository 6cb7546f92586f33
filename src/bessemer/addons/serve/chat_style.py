"""The style of the prompts that a served model reads."""

from bessemer.data.chat import USER
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError


def template_style(tokenizer: Tokenizer) -> str | None:
    """The style that a model directory was trained with; None if it has its own template. Without a template: `r1` if
    its control tokens exist, else `zero`."""
    if tokenizer.chat_style or tokenizer.chat_template:
        return tokenizer.chat_style
    try:
        tokenizer.special_id(USER)
    except UserError:
        return "zero"
    return "r1"
