"""Special tokens, and conversations as prompts: R1-Zero's template (R1 Table 1), its plain form, and R1's template.

`zero`     BOS + system, newline + `User: {content}` newline `Assistant:` + answer + EOS
`r1-zero`  the same, and a conversation without system messages begins with the preamble of R1 Table 1
`r1`       BOS + system + <｜User｜> + content + <｜Assistant｜> + answer + EOS; a prompt ends in
           `<｜Assistant｜><think>` newline

System messages are collected at the front and joined by a blank line. `zero` is the form of our pre-training pages;
`r1-zero` tells a base that has seen no such pages which form it is paid for.

Why `zero` ends in `Assistant:` without a blank. A prompt and its completion are tokenised separately, a document as one
text, and both must give the same ids. An answer that opens with `<think>` follows the colon directly: the added token
cuts the text there. Any other answer follows one blank, and `:` before a blank is a token end in V3's pre-split. A
prompt that ended in a blank would break the second case, for ` word` is one token.

Invariants
- `render_ids` never looks for control tokens in a content; they enter as ids only. BOS stands once, at the start.
- An assistant turn that is the last message is kept whole, because it is trained on; `r1` drops the thinking of every
  earlier turn. SFT does not train on a turn that lost its thoughts: it would teach to answer without thinking, and no
  prompt of `r1` leads up to such a turn. After an assistant turn there is nothing to answer, so no generation prompt
  follows.
- A user's text cannot forge a turn. What would begin one in `zero`, `User:` or `Assistant:` at the start of a line,
  gets a blank in front; a tag that the user typed is plain text, in two pieces. (Other programs, which encode what
  `jinja` renders as one text, read such a tag as the token.)
- `jinja(style)` renders the same text as `render`.

The special tokens are those of the DeepSeek family. The bars are U+FF5C and the underscores U+2581, as in the published
tokenizer. Their position in `ADDED` is their id in a tokenizer of our own training; a tokenizer read from elsewhere
keeps its own ids. `<think>`, `</think>` and R1-Zero's `<answer>`, `</answer>` are added tokens that are *not* special:
each is one id wherever it stands in a text, and decoding with `skip_special` keeps it, because reasoning parsers look
for it. The answer tags are ours: V3's pre-split would glue the colon of `Assistant:` to a `<` that follows it, so that
a prompt ending in a colon could never lead to an answer without thoughts.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple, Protocol

from bessemer.errors import UserError

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
NOT_SPECIAL = frozenset({THINK, THINK_END, ANSWER, ANSWER_END})
ZERO_STYLES = ("zero", "r1-zero")
STYLES = (*ZERO_STYLES, "r1")

ZERO_PREAMBLE = (
    "This is a conversation between a User and an Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first reasons in its mind and then gives the User the answer. The reasoning stands inside "
    "<think> </think> tags and the answer inside <answer> </answer> tags, in this form: "
    "<think> the reasoning </think> <answer> the answer </answer>."
)
"""The preamble of R1 Table 1, sentence for sentence in our words: the two roles, first the reasoning and then the
answer, the tags of each, the form written out once. No hint on how to reason."""

_TURN = re.compile(r"\n(?=(?:User|Assistant):)")
_GUARD = r".replace('\nUser:', '\n User:').replace('\nAssistant:', '\n Assistant:')"
"""The same in the template; those that were written before 0.2 lack it."""
_INSIDE_TAG = re.compile(r"(?<=<)(?=/?(?:think|answer)>)")

Message = dict[str, str]


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    eos_id: int
    chat_template: str

    @property
    def bos_id(self) -> int | None: ...

    @property
    def chat_style(self) -> str | None: ...

    def encode(self, text: str) -> list[int]: ...

    def special_id(self, content: str) -> int: ...

    def render_answers(
        self, messages: Sequence["Message"], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]: ...


def is_special(content: str) -> bool:
    """Whether an added token is control, not text. The hub's own files leave `<｜User｜>` unmarked; the bars tell."""
    return content.startswith("<｜") and content.endswith("｜>")


class ChatPiece(NamedTuple):
    """A piece of a conversation. Two texts meet at a line break before a letter, or as explained above, so that the ids
    of the pieces are the ids of the whole."""

    text: str
    control: bool = False
    """The text is one control token, not text."""
    answer: bool = False
    """Written by the assistant; SFT trains on it."""
    typed: bool = False
    """Written by the user, so without any control token."""


def render(messages: Sequence[Message], style: str = "r1", add_generation_prompt: bool = True) -> str:
    """The conversation as text, BOS included."""
    return "".join(piece.text for piece in _pieces(messages, style, add_generation_prompt))


def render_ids(
    tokenizer: ChatTokenizer, messages: Sequence[Message], style: str | None = None, add_generation_prompt: bool = True
) -> list[int]:
    """The conversation as ids, BOS included. `style` None is the tokenizer's own."""
    return render_answers(tokenizer, messages, style, add_generation_prompt)[0]


def render_answers(
    tokenizer: ChatTokenizer, messages: Sequence[Message], style: str | None = None, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids as in `render_ids`, and for each whether the assistant wrote it (answers and the EOS after them)."""
    style = style or tokenizer.chat_style
    if style is None:
        check_messages(messages)
        return tokenizer.render_answers(messages, add_generation_prompt)
    ids: list[int] = []
    answers: list[bool] = []
    for piece in _pieces(messages, style, add_generation_prompt):
        new = _control_ids(tokenizer, piece.text) if piece.control else []
        for text in () if piece.control else typed_pieces(piece.text) if piece.typed else (piece.text,):
            new += tokenizer.encode(text)
        ids += new
        answers += [piece.answer] * len(new)
    return ids, answers


def typed_pieces(text: str) -> list[str]:
    """A text cut inside every tag, so that each of the pieces is plain text to a tokenizer."""
    return _INSIDE_TAG.split(text)


def question_ids(tokenizer: ChatTokenizer, question: str) -> list[int]:
    """The prompt that asks one question, in the tokenizer's own style."""
    return render_ids(tokenizer, [{"role": "user", "content": question}])


def template_style(tokenizer: ChatTokenizer) -> str | None:
    """The style that a model directory was trained with; None if it has a template of its own. Without either: R1's
    where its control tokens exist, else `zero`."""
    if tokenizer.chat_style or tokenizer.chat_template:
        return tokenizer.chat_style
    try:
        tokenizer.special_id(USER)
    except UserError:
        return "zero"
    return "r1"


def opening(style: str | None) -> str:
    """The start of the answer that a generation prompt already contains; a completion continues it."""
    return f"{THINK}\n" if style == "r1" else ""


def transcript(messages: Sequence[Message]) -> str:
    """The conversation as a plain document: `zero` without control tokens, turns on lines of their own."""
    pieces = _pieces(messages, "zero", add_generation_prompt=False)
    text = "".join({BOS: "", EOS: "\n"}[piece.text] if piece.control else piece.text for piece in pieces)
    return text.removesuffix("\n")


@cache
def jinja(style: str) -> str:
    """The chat template of a model directory. Line breaks of its file are layout only."""
    _check_style(style)
    file = "chat_zero.jinja" if style in ZERO_STYLES else f"chat_{style}.jinja"
    text = resources.files("bessemer.data").joinpath(file).read_text("utf-8").replace("\n", "")
    preamble = f"{{%- if not ns.seen -%}}{{%- set ns.system = {json.dumps(ZERO_PREAMBLE)} -%}}{{%- endif -%}}"
    return text.replace("{{- bos_token -}}", preamble + "{{- bos_token -}}") if style == "r1-zero" else text


def style_of(template: str | None) -> str | None:
    """The style whose template this is, None for any other."""
    return next((style for style in STYLES if template in (jinja(style), jinja(style).replace(_GUARD, ""))), None)


def _pieces(messages: Sequence[Message], style: str, add_generation_prompt: bool) -> list[ChatPiece]:
    _check_style(style)
    check_messages(messages)
    system_texts = [message["content"] for message in messages if message["role"] == "system"]
    system = ZERO_PREAMBLE if style == "r1-zero" and not system_texts else "\n\n".join(system_texts)
    turn = _zero_turn if style in ZERO_STYLES else _r1_turn
    pieces = [ChatPiece(BOS, control=True)]
    if system:
        pieces.append(ChatPiece(system + "\n" if style in ZERO_STYLES else system))
    for number, message in enumerate(messages):
        if message["role"] != "system":
            pieces += turn(message["role"], message["content"], last=number == len(messages) - 1)
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        r1 = [ChatPiece(ASSISTANT, control=True), ChatPiece(opening(style))]
        pieces += [ChatPiece("Assistant:")] if style in ZERO_STYLES else r1
    return pieces


def _zero_turn(role: str, content: str, last: bool) -> list[ChatPiece]:
    if role == "user":
        return [ChatPiece("User: " + _TURN.sub("\n ", content) + "\n", typed=True)]
    gap = "" if content.startswith(THINK) else " "
    return [ChatPiece("Assistant:"), ChatPiece(gap + content, answer=True), ChatPiece(EOS, control=True, answer=True)]


def _r1_turn(role: str, content: str, last: bool) -> list[ChatPiece]:
    if role == "user":
        return [ChatPiece(USER, control=True), ChatPiece(content, typed=True)]
    shown = content if last else content.split(THINK_END)[-1]
    answer = shown == content
    return [ChatPiece(ASSISTANT, control=True), ChatPiece(shown, answer=answer), ChatPiece(EOS, True, answer)]


def _control_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The one id of a control token; none for BOS where a foreign tokenizer puts none in front of a text."""
    if text == BOS:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [tokenizer.eos_id if text == EOS else tokenizer.special_id(text)]


def exchange(question: str, answer: str) -> list[Message]:
    """A conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise UserError(f"unknown chat style {style!r}; choose one of {', '.join(STYLES)}")


def check_messages(messages: Sequence[Message]) -> None:
    """UserError for what is no conversation of texts; says which message, and the fix."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {number} must be an object with a role and a content")
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"message {number} has role {message['role']!r}; choose system, user or assistant")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UserError(f"message {number} has a content that is not text ({kind}); write one string")
        if extra := sorted(message.keys() - {"role", "content"}):
            raise UserError(f"message {number} has {extra[0]!r}, which no template renders; put it into the content")
