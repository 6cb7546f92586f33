"""Chat templates of other people: Jinja text that turns messages into a prompt.

A template is code from outside. It runs in the sandbox of the transformers library, which is also what everybody else
renders it with, so the text is the one the model was trained on.
"""

import json
from collections.abc import Sequence

from bessemer.data.chat import Message
from bessemer.errors import UserError


class Template:
    """`template(messages, add_generation_prompt) -> text`. `names` are the special tokens it may write."""

    def __init__(self, text: str, names: dict[str, str]):
        try:
            from transformers.utils import chat_template_utils
        except ImportError:
            raise UserError("chat templates of other models need transformers: pip install 'bessemer[hf]'") from None
        self.text, self.names = text, names
        self._render = chat_template_utils.render_jinja_template

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            (text,), _ = self._render(
                [list(messages)], chat_template=self.text, add_generation_prompt=add_generation_prompt, **self.names
            )
        except Exception as error:  # whatever a template may do
            raise UserError(f"the chat template of this model refuses the conversation: {error}") from error
        return text


def add_system(template: str, system: str) -> str:
    """A template that begins every conversation without a system message with this one."""
    said = json.dumps(system, ensure_ascii=False)
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + said + "}] + messages -%}"
        "{%- endif -%}" + template
    )
