"""Renders the chat template of a foreign model in a child process with limits on time and memory.

A template is an untrusted program. Jinja's sandbox keeps it away from Python and the system, but does not stop it from
looping for hours or building gigabytes of text, and neither can be seen in its source. So no template is compiled or
rendered in the main process. One child (this module, run by itself) does this for all templates. The kernel
kills it after CPU_SECONDS on one conversation, whatever it is doing; its memory and the length of the text are limited
too. After a kill, the next conversation gets a new child.

The environment is that of transformers, for which templates are written: blocks are trimmed, loops have break and
continue, `{% generation %}` marks what the assistant wrote, `tojson` does not escape HTML, and `raise_exception` and
`strftime_now` exist. Tests compare the two renderings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bessemer.addons.tasks.child import Child, NoReply, bounded, confine, serve
from bessemer.data.chat import Message
from bessemer.errors import UserError

if TYPE_CHECKING:
    import jinja2

CPU_SECONDS = 1.0
"""CPU time for one conversation, including compilation for a template's first. Usually it takes a few milliseconds."""
PATIENCE = 120.0
"""Seconds to wait for a text: the machine may be busy, and the child may be starting."""
MEMORY = 1 << 29
"""Bytes that templates may use beyond what the child itself needs."""
LONGEST_TEMPLATE = 1 << 20
"""Characters; the longest published templates have some ten thousand."""
LONGEST_TEXT = 1 << 22
"""Characters that a template may write beyond four times the length of the conversation."""


class ChatTemplate:
    """`template(messages, add_generation_prompt) -> text`. `names`: its other variables, the special tokens that it may
    write and switches. Raises UserError if the template refuses the conversation or exceeds a limit."""

    def __init__(self, text: str, names: Mapping[str, str | bool]):
        if find_spec("jinja2") is None:
            raise UserError("chat templates of other models need jinja2: pip install 'bessemer[hf]'")
        if len(text) > LONGEST_TEMPLATE:
            raise UserError(f"the chat template has {len(text)} characters; the limit is {LONGEST_TEMPLATE}")
        self.text, self.names = text, dict(names)

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        request = {"template": self.text, "names": self.names, "messages": list(messages), "ask": add_generation_prompt}
        try:
            reply = _renderer(os.getpid()).exchange(request, PATIENCE)
        except NoReply as error:
            if error.out_of_time:
                why = f"takes more than {CPU_SECONDS:g} s of processor time on one conversation"
            else:
                why = f"crashes the process that renders it ({error})"
            raise UserError(f"the chat template of this model {why}; use the template of a model you trust") from error
        if "error" in reply:
            raise UserError(f"the chat template of this model rejects the conversation: {reply['error']}")
        return str(reply["text"])


@cache
def _renderer(pid: int) -> Child:
    """One per process: a forked worker must not write to its parent's pipe."""
    return Child("bessemer.addons.families.chat_template", max_reply=1 << 28)


def main() -> None:
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  imported before the limit applies

    confine(MEMORY)
    serve(_answer)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        with bounded(CPU_SECONDS):
            text = _compiled(request["template"]).render(
                messages=request["messages"], add_generation_prompt=request["ask"], tools=None, documents=None,
                **request["names"],
            )  # fmt: skip
        most = LONGEST_TEXT + 4 * sum(len(message["content"]) for message in request["messages"])
        return {"text": text} if len(text) <= most else {"error": f"it writes {len(text)} characters"}
    except Exception as error:  # a template can raise anything
        return {"error": _one_line(error)}


def _one_line(error: Exception) -> str:
    """What the template raised, on one line without terminal control characters."""
    text = str(error)[:300] or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text).strip()


@lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    import jinja2

    namespace = _namespace()

    class Generation(jinja2.ext.Extension):
        """The block adds nothing to the text; variables set in it are local to it."""

        tags = {"generation"}  # noqa: RUF012  as jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *items, **named: dict(*items, **named), "namespace": namespace,
    }  # fmt: skip
    return environment.from_string(text)


def _namespace() -> Callable[..., Any]:
    """Jinja's `namespace` without names that begin with an underscore, which give access to Python's internals."""
    import jinja2.utils

    def checked(name: str) -> str:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r} here")
        return name

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(checked(name), value)

    return lambda *items, **named: Namespace({checked(k): v for k, v in dict(*items, **named).items()})


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


if __name__ == "__main__":
    main()
