"""Special tokens, and conversations as prompts: R1-Zero's template (R1 Table 1), its plain form, and R1's template.

`zero`     BOS + system, newline + `User: {content}` newline `Assistant:` + answer + EOS
`r1-zero`  the same, and a conversation without system messages begins with the preamble of R1 Table 1
`r1`       BOS + system + <｜User｜> + content + <｜Assistant｜> + answer + EOS; a prompt ends in
           `<｜Assistant｜><think>` newline

System messages are collected at the front and joined by a blank line. `zero` is the form of our pre-training pages;
`r1-zero` tells a base model that has seen no such pages which form is rewarded.

A conversation with tools adds their description (the hook `tools`) to the end of the system message. `r1` writes calls
and outputs as DeepSeek-V3.1 does: calls end an assistant message, and the assistant continues after an output without a
second <｜Assistant｜>. A prompt then opens a new thought with `<think>` newline, like every prompt of `r1`; V3.1 calls
tools without thinking. `zero` has only two roles, so outputs are user messages. A template that is not ours gets the
conversation in the same plain form (`plain`).

Why `zero` ends in `Assistant:` without a space: a prompt and its completion are tokenised separately, a document as one
text, and both must give the same ids. An answer that opens with `<think>` follows the colon directly: the added token
cuts the text there. Any other answer follows one space, and V3's pre-split ends a token at a `:` before a space. A
prompt that ended in a space would break the second case, because ` word` is one token.

Invariants
- `render_ids` never looks for control tokens in a content; they enter only as ids. BOS occurs once, at the start.
- An assistant turn that is the last message is kept whole, because it is trained on. `r1` drops the thoughts of every
  earlier turn except those that call a tool while answering the last question: the next call continues the same ids.
  SFT does not train on a turn that lost its thoughts: that would teach the model to answer without thinking, and no
  prompt of `r1` leads to such a turn. After an assistant turn there is nothing to answer, so no generation prompt
  follows. Tool outputs are never trained on.
- A user's or a tool's text cannot forge a turn. In `zero`, `User:` or `Assistant:` at the start of a line gets a space
  in front; a typed tag is plain text, in two pieces; `rewritten` guards the marks of tools. (Other programs,
  which encode the text that `jinja` renders as a whole, read such a tag as the token.)
- `jinja(style)` renders the same text as `render`.

The special tokens are those of the DeepSeek family. The bars are U+FF5C and the underscores U+2581, as in the published
tokenizer. Their position in `ADDED` is their id in a tokenizer that we train; a tokenizer from elsewhere keeps its own
ids. `<think>`, `</think>` and R1-Zero's `<answer>`, `</answer>` are added tokens that are *not* special: each is one id
wherever it occurs in a text, and decoding with `skip_special` keeps it, because reasoning parsers look for it. The
answer tags are our addition: otherwise V3's pre-split would join the colon of `Assistant:` to a `<` after it, so that a
prompt ending in a colon could never lead to an answer without thoughts.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, Protocol

from bessemer import plugins
from bessemer.errors import UserError

Message = dict[str, Any]
"""{"role": ..., "content": ...}, and of calls and outputs what OpenAI's form has."""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
ANSWER = "<answer>"
ANSWER_END = "</answer>"

ADDED = (BOS, EOS, PAD, USER, ASSISTANT, THINK, THINK_END, FIM_HOLE, FIM_BEGIN, FIM_END, ANSWER, ANSWER_END)
CALLS = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
OUTPUTS = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"
OUTPUT = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"
MARKS = (CALLS, CALLS_END, CALL, CALL_END, SEPARATOR, OUTPUTS, OUTPUTS_END, OUTPUT, OUTPUT_END)
"""V3's tokens for tools. V3.1 does not write the marks around all outputs together, and neither do we."""
_MARK = re.compile(f"({'|'.join(map(re.escape, MARKS))})")
HEAD = "## Tools\nYou have access to these tools:\n\n"
FORM = (
    "To call a tool, end your message with this, exactly:\n"
    f"{CALLS}{CALL}NAME{SEPARATOR}ARGUMENTS{CALL_END}{CALLS_END}\n"
    "NAME is the name of a tool above, and ARGUMENTS is a JSON object that fits its parameters. Several calls stand "
    f"between {CALLS} and {CALLS_END} one directly after another."
)
"""V3.1's form of a call, and the beginning of the description of tools; the words are ours."""

NOT_SPECIAL = frozenset({THINK, THINK_END, ANSWER, ANSWER_END})
ZERO_STYLES = ("zero", "r1-zero")
STYLES = (*ZERO_STYLES, "r1")

ZERO_PREAMBLE = (
    "This is a conversation between a User and an Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first reasons in its mind and then gives the User the answer. The reasoning stands inside "
    "<think> </think> tags and the answer inside <answer> </answer> tags, in this form: "
    "<think> the reasoning </think> <answer> the answer </answer>."
)
"""The preamble of R1 Table 1, sentence by sentence in our own words: the two roles, reasoning first and then the
answer, the tags of each, and the form written out once. It gives no hint on how to reason."""

_TURN = re.compile(r"\n(?=(?:User|Assistant):)")
_INSIDE_TAG = re.compile(r"(?<=<)(?=/?(?:think|answer)>)")


class ChatTokenizer(Protocol):
    """What rendering needs from a tokenizer."""

    eos_id: int
    chat_template: str

    @property
    def bos_id(self) -> int | None: ...

    @property
    def chat_style(self) -> str | None: ...

    @property
    def tool_marks(self) -> dict[str, int]: ...

    def encode(self, text: str, after: int | None = None) -> list[int]: ...

    def special_id(self, content: str) -> int: ...

    def render_answers(
        self, messages: Sequence["Message"], add_generation_prompt: bool = False, every: bool = True
    ) -> tuple[list[int], list[bool]]: ...


def is_special(content: str) -> bool:
    """Whether an added token is control, judged by its bars: published files do not mark `<｜User｜>` as special."""
    return content.startswith("<｜") and content.endswith("｜>")


class ChatPiece(NamedTuple):
    """A piece of a conversation. Two texts meet only at a line break before a letter, or as explained above, so the ids
    of the pieces together are the ids of the whole."""

    text: str
    control: bool = False
    """The text is the name of one control token."""
    answer: bool = False
    """Written by the assistant; SFT trains on it."""
    typed: bool = False
    """Written by the user or a tool, so no control token may come from it."""


def render(
    messages: Sequence[Message], style: str = "r1", add_generation_prompt: bool = True, tools: Sequence[Any] = ()
) -> str:
    """The conversation as text, including BOS."""
    return "".join(piece.text for piece in _pieces(messages, style, add_generation_prompt, tools))


def render_ids(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    style: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] = (),
) -> list[int]:
    """The conversation as ids, including BOS. `style` None is the tokenizer's own."""
    return render_answers(tokenizer, messages, style, add_generation_prompt, tools, every=False)[0]


def render_answers(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    style: str | None = None,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] = (),
    every: bool = True,
) -> tuple[list[int], list[bool]]:
    """Ids as in `render_ids`, and for each whether the assistant wrote it (answers, calls and the EOS after them).
    `every` false: a template that is not ours need not show where the answers before the last message are."""
    style = style or tokenizer.chat_style
    if style is None:
        check_messages(messages)
        plain = tool_texts().plain(messages, tools) if has_tools(messages, tools) else messages
        return tokenizer.render_answers(plain, add_generation_prompt, every)
    pieces = _pieces(messages, style, add_generation_prompt, tools)
    return _ids(tokenizer, pieces, tokenizer.tool_marks if has_tools(messages, tools) else {})


def outputs_ids(tokenizer: ChatTokenizer, outputs: Sequence[str], style: str | None = None) -> list[int]:
    """The ids between an answer that ended with calls and EOS, and the assistant's next answer: the outputs of the
    calls in their order, and the generation prompt. Multi-turn rollouts append these ids to the sampled ones, which
    `render_ids` of the parsed conversation need not reproduce."""
    if not outputs:
        raise UserError("an answer with calls needs at least one tool output before the next answer")
    style = style or tokenizer.chat_style
    if style is None:
        raise UserError("only our own templates can continue turns with tools; name a style: " + ", ".join(STYLES))
    _check_style(style)
    [message] = tool_texts().rewritten([{"role": "tool", "content": output} for output in outputs])
    turn = _zero_turn if style in ZERO_STYLES else _r1_turn
    pieces = [*turn("tool", message["content"], thinks=True), *_generation_prompt(style, after_output=True)]
    return _ids(tokenizer, pieces, tokenizer.tool_marks, tokenizer.eos_id)[0]


def _ids(
    tokenizer: ChatTokenizer, pieces: Sequence[ChatPiece], marks: dict[str, int], after: int | None = None
) -> tuple[list[int], list[bool]]:
    """The ids of the pieces after the id `after`, and which of them the assistant wrote. `marks` become tokens in every
    piece."""
    ids: list[int] = []
    answers: list[bool] = []
    for piece in pieces:
        ids += _control_ids(tokenizer, piece.text) if piece.control else []
        for text in () if piece.control else split_at_marks(piece.text) if marks else (piece.text,):
            if text in marks:
                ids.append(marks[text])
                continue
            for part in typed_pieces(text) if piece.typed else (text,):
                ids += tokenizer.encode(part, ids[-1] if ids else after)
        answers += [piece.answer] * (len(ids) - len(answers))
    return ids, answers


def has_tools(messages: Sequence[Message], tools: Sequence[Any] = ()) -> bool:
    """Whether a conversation has tools, calls or outputs."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def split_at_marks(text: str) -> list[str]:
    """A text cut before and after every mark of tools."""
    return [part for part in _MARK.split(text) if part]


def tool_texts() -> Any:
    """The add-on that writes tools, calls and outputs as text."""
    if (tools := plugins.hook("tools")) is None:
        raise UserError("a conversation with tools needs the add-on of tasks, which is not installed")
    return tools


def typed_pieces(text: str) -> list[str]:
    """A text cut inside every tag, so that each piece is plain text to a tokenizer."""
    return _INSIDE_TAG.split(text)


def question_ids(tokenizer: ChatTokenizer, question: str) -> list[int]:
    """The prompt that asks one question, in the tokenizer's own style."""
    return render_ids(tokenizer, [{"role": "user", "content": question}])


def opening(style: str | None) -> str:
    """The start of the answer that a generation prompt already contains; a completion continues it."""
    return f"{THINK}\n" if style == "r1" else ""


def transcript(messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """The conversation as a plain document: `zero` without control tokens, each turn on its own line."""
    pieces = _pieces(messages, "zero", add_generation_prompt=False, tools=tools)
    text = "".join({BOS: "", EOS: "\n"}[piece.text] if piece.control else piece.text for piece in pieces)
    return text.removesuffix("\n")


@cache
def jinja(style: str) -> str:
    """The Jinja chat template of a style, for a model directory. Line breaks in its source files are layout only."""
    _check_style(style)
    text = _template("zero" if style in ZERO_STYLES else style)
    if style == "r1-zero":
        preamble = f"{{%- set ns.system = {json.dumps(ZERO_PREAMBLE)} -%}}{{%- set ns.seen = true -%}}"
        text = text.replace("@TOOLS@", f"{{%- if not ns.seen -%}}{preamble}{{%- endif -%}}@TOOLS@")
    head, form = (json.dumps(part, ensure_ascii=False) for part in (HEAD, FORM))
    described = _template("tools").replace("@HEAD@", head).replace("@FORM@", form)
    return text.replace("@TOOLS@", described).replace("@CALLS@", _template("calls"))


def _template(name: str) -> str:
    return resources.files("bessemer.data").joinpath(f"chat_{name}.jinja").read_text("utf-8").replace("\n", "")


def style_of(template: str | None) -> str | None:
    """The style whose template this is; None for any other template."""
    return next((style for style in STYLES if template == jinja(style)), None)


def _pieces(
    messages: Sequence[Message], style: str, add_generation_prompt: bool, tools: Sequence[Any]
) -> list[ChatPiece]:
    _check_style(style)
    check_messages(messages)
    if has_tools(messages, tools):
        messages = tool_texts().rewritten(messages)
    system = [message["content"] for message in messages if message["role"] == "system"]
    if style == "r1-zero" and not system:
        system = [ZERO_PREAMBLE]
    head = "\n\n".join([*system, tool_texts().description(tools)] if tools else system)
    turn = _zero_turn if style in ZERO_STYLES else _r1_turn
    pieces = [ChatPiece(BOS, control=True)]
    if head:
        pieces.append(ChatPiece(head + "\n" if style in ZERO_STYLES else head))
    question = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    after_output = False
    for number, message in enumerate(messages):
        if message["role"] != "system":
            calls = message.get("calls", "")
            thinks = number == len(messages) - 1 or bool(calls and number > question)
            pieces += turn(message["role"], message["content"], thinks, calls, after_output)
            after_output = message["role"] == "tool"
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        pieces += _generation_prompt(style, after_output)
    return pieces


def _generation_prompt(style: str, after_output: bool) -> list[ChatPiece]:
    if style in ZERO_STYLES:
        return [ChatPiece("Assistant:")]
    return [ChatPiece(ASSISTANT, control=True)] * (not after_output) + [ChatPiece(opening(style))]


def _zero_turn(role: str, content: str, thinks: bool, calls: str = "", after_output: bool = False) -> list[ChatPiece]:
    if role != "assistant":
        return [ChatPiece("User: " + _TURN.sub("\n ", content) + "\n", typed=True)]
    answer = ("" if content.startswith(THINK) else " ") + content + calls
    return [ChatPiece("Assistant:"), ChatPiece(answer, answer=True), ChatPiece(EOS, control=True, answer=True)]


def _r1_turn(role: str, content: str, thinks: bool, calls: str = "", after_output: bool = False) -> list[ChatPiece]:
    if role == "tool":
        return [ChatPiece(content, typed=True)]
    if role == "user":
        return [ChatPiece(USER, control=True), ChatPiece(content, typed=True)]
    text = content if thinks else content.split(THINK_END)[-1]
    answer = text == content
    begin = [ChatPiece(ASSISTANT, control=True)] * (not after_output)
    return [*begin, ChatPiece(text + calls, answer=answer), ChatPiece(EOS, True, answer)]


def _control_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The id of a control token; none for BOS if the tokenizer has no BOS."""
    if text == BOS:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [tokenizer.eos_id if text == EOS else tokenizer.special_id(text)]


def exchange(question: str, answer: str) -> list[Message]:
    """A conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise UserError(f"unknown chat style {style!r}; choose one of {', '.join(STYLES)}")


ROLES = {"system": (), "user": (), "assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""The roles of messages, and the fields that each may have in addition to a content."""


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UserError if this is not a conversation of texts; it names the message and the fix."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"{where} must be an object with a role and a content")
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{where} has role {role!r}; choose system, user, assistant or tool")
        if calls := message.get("tool_calls") if role == "assistant" else None:
            tool_texts().check_calls(calls, where)
        content = message.get("content", "" if calls else None)
        if "content" not in message and not calls:
            raise UserError(f"{where} must be an object with a role and a content")
        if not isinstance(content, str) and not (content is None and calls):
            kind = type(content).__name__
            raise UserError(f"{where} has a content that is not text ({kind}); write one string")
        if extra := sorted(message.keys() - {"role", "content", *ROLES[role]}):
            raise UserError(f"{where} has {extra[0]!r}, which no template renders; put it into the content")
