"""The tokenizer of a foreign model: its own tokenizer.json and chat template behind the interface of `Tokenizer`.

Differences from our own tokenizer, resolved once when it is loaded:
- BOS is where the model's own tokenizer puts it before a document, which may be nowhere (`bos_id` None). A prompt
  has only the BOS that its template writes.
- An answer ends with the token that the template writes after it (`eos_id`), a document with the tokenizer's own end
  of text (`end_id`), which also stops an answer (`stop_ids`). In many models the latter is also the padding.
- Byte-level and SentencePiece vocabularies (▁ for a blank, <0x0A> for a byte) both become a table of bytes.

A chat template is untrusted Jinja code; `chat_template` renders it with limits.

Invariants
- A control token inside a message is text, never control: contents are masked while the template runs.
- The ids of a prompt are those of `apply_chat_template(..., tokenize=True)`. Those of a conversation that ends with an
  answer are split where an answer begins, since there a prompt ends and a completion begins.
- A template that drops part of the last answer, writes no end after it or changes earlier turns is an error where
  answers must be located; a prompt needs none of it.
"""

import json
import re
from collections.abc import Sequence
from copy import copy, deepcopy
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, Self

import tokenizers

from bessemer.addons.families import patterns
from bessemer.addons.families.chat_template import ChatTemplate
from bessemer.data import chat
from bessemer.data.chat import NOT_SPECIAL, THINK, THINK_END, Message
from bessemer.data.model_files import read_object
from bessemer.data.tokenizer import (
    TEMPLATE_FILE,
    Tokenizer,
    byte_of_character,
    empty_table,
    fingerprint_of,
    template_of,
    token_text,
)
from bessemer.errors import UserError

NO_TEMPLATE = (
    'this model has no chat template, so it cannot be asked a question: import it with style = "r1-zero" (R1-Zero\'s '
    "prompt), or put the template of its instruct sibling into chat_template.jinja"
)
MEND = 'mend it, or import the model with style = "r1-zero"'
# The pre-split that llama.cpp calls deepseek-v3, as in a tokenizer.json of V3 or of our own.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_EMPTY_THOUGHT = re.compile(rf"{THINK}\s*{THINK_END}\s*$")
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode's private-use characters."""


class HFTokenizer(Tokenizer):
    """A tokenizer in the Hugging Face format with its own chat template; created by `load`."""

    def __init__(self, spec: dict, config: dict, names: dict[str, str], chat_template: str):
        """`spec` and `config` are tokenizer.json and tokenizer_config.json, `names` the special tokens they name."""
        self._spec, self._config, self._names = spec, config, names
        self._tok = _tokenizer(spec)
        after, inside = (_without_blank(spec, schemes) for schemes in (("first",), None))
        self._after = self._tok if after == spec else _tokenizer(after)
        self._inside = self._after if inside == after else _tokenizer(inside)
        self._added = {token["id"]: token["content"] for token in spec["added_tokens"]}
        self._special = {token["id"] for token in spec["added_tokens"] if token["special"]}
        self._tags = not NOT_SPECIAL.isdisjoint(self._added.values())
        self._control = {self._added[i]: i for i in self._special}
        self._greedy = _greedy(spec["added_tokens"])
        self._bytes = _byte_table(self._tok, spec.get("decoder") or {}, self._added)
        if "eos_token" not in names:
            raise UserError("tokenizer_config.json names no eos_token, so an answer could never end; add it")
        self._end = self._id(names["eos_token"])
        self.pad_id = self._id(names.get("pad_token", names["eos_token"]))
        begun = self._tok.encode("a", add_special_tokens=True)
        self.bos_id = begun.ids[0] if any(begun.special_tokens_mask[:1]) else None
        self.fingerprint = fingerprint_of(spec)
        self._adopt(chat_template)

    @classmethod
    def load(cls, directory: str | Path, own_template: bool = True) -> "HFTokenizer":
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise UserError(
                f"{directory} has no tokenizer.json. If it has an older kind of tokenizer, "
                "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one"
            )
        spec, config = (read_object(directory / name) for name in ("tokenizer.json", "tokenizer_config.json"))
        patterns.check(spec, str(directory / "tokenizer.json"))
        try:
            template = template_of(directory, config) if own_template else ""
            return cls(spec, config, _names(directory, config), template)
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{directory / 'tokenizer.json'} is broken ({error}); download it again") from error

    @staticmethod
    def _encoded(tok: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        with patterns.explained():
            return Tokenizer._encoded(tok, texts)

    def save(self, directory: str | Path) -> None:
        """Writes the files as they were read, with the current template."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {name: value for name, value in self._config.items() if name != "chat_template"} | self._names
        if self.chat_template:
            config["chat_template"] = self.chat_template
            (directory / TEMPLATE_FILE).write_text(self.chat_template, "utf-8")
        (directory / "tokenizer.json").write_text(json.dumps(self._spec, indent=2, ensure_ascii=False), "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    @property
    def chat_style(self) -> str | None:
        return super().chat_style

    @chat_style.setter
    def chat_style(self, style: str) -> None:
        self._adopt(self._jinja(style))

    def set_system(self, system: str) -> None:
        if self._template is None:
            raise UserError("a system message needs the model's own chat template, and this model has none")
        self._adopt(add_system(self.chat_template, system))

    @property
    def stop_ids(self) -> list[int]:
        return list(dict.fromkeys((self.eos_id, self._end)))

    @property
    def end_id(self) -> int:
        return self._end

    @property
    def opening(self) -> str:
        return self._opening if self._template else super().opening

    @property
    def renders(self) -> bool:
        return self._template is not None or super().renders

    def switched(self, thinking: bool) -> Self:
        """A copy whose chat template reads the switch as `thinking` (DeepSeek-V3.1) and `enable_thinking` (Qwen3)."""
        tokenizer = copy(self)
        switches = {"thinking": thinking, "enable_thinking": thinking}
        tokenizer._template = self._template and ChatTemplate(self.chat_template, {**self._names, **switches})
        return tokenizer

    def trimmed(self, text: str) -> str:
        return self._greedy.sub(lambda match: match[match.lastindex or 0], text) if self._greedy else text

    def render_answers(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, every: bool = True
    ) -> tuple[list[int], list[bool]]:
        if self._template is None:
            raise UserError(NO_TEMPLATE)
        masked, unmask, cut = self._mask(messages)
        text = self._render(masked, add_generation_prompt and messages[-1]["role"] != "assistant")
        ids: list[int] = []
        answers: list[bool] = []
        position = 0
        for start, stop in [*self._spans(masked, text, every), (len(text), len(text))]:
            for first, last, answer in ((position, start, False), (start, stop, True)):
                new = self._encode(text[first:last], unmask, cut, ids[-1] if ids else None)
                ids += new
                answers += [answer] * len(new)
            position = stop
        return ids, answers

    def _continuing(self, after: int | None) -> tokenizers.Tokenizer:
        return self._tok if after is None else self._after if after in self._added else self._inside

    def _adopt(self, chat_template: str) -> None:
        """Sets the template and renders a test conversation to find how answers begin and end in it."""
        self.chat_template, self._template, self._opening, self.eos_id = chat_template, None, "", self._end
        if not chat_template or self.chat_style is not None:
            return
        self._template = ChatTemplate(chat_template, self._names)
        question = [{"role": "user", "content": "question"}]
        talk = [*question, {"role": "assistant", "content": "\ue000"}]
        prompt = self._render(question, add_generation_prompt=True)
        head, mark, rest = self._render(talk, add_generation_prompt=False).partition("\ue000")
        head = _EMPTY_THOUGHT.sub("", head)  # Qwen3's and others' before a last answer without thoughts
        begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, head, strict=False)))
        if not mark or head[begin:].strip():
            raise UserError(f"the chat template does not open an answer after add_generation_prompt; {MEND}")
        self._opening = prompt[begin:]
        end = next(self._controls(rest), None)
        if end is None:  # GLM's: the next turn's token ends an answer
            rest = self._render([*talk, *question], add_generation_prompt=False).partition("\ue000")[2]
            end = next(self._controls(rest), None)
        if end is None:
            raise UserError(f"no answer would ever end: the chat template writes no control token after it; {MEND}")
        self.eos_id = self._control[end.group()]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """What the template writes, without the white space that its control tokens take."""
        assert self._template is not None, "our own templates mark the answers themselves"
        return self.trimmed(self._template(messages, add_generation_prompt))

    def _spans(self, messages: Sequence[Message], text: str, every: bool) -> list[tuple[int, int]]:
        """Start and end of each assistant message in the text, its end token included; with `every` false only of the
        last message."""
        spans = []
        for number, message in list(enumerate(messages))[0 if every else -1 :]:
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True).removesuffix(self._opening)
            if not text.startswith(before):
                raise UserError(
                    "the chat template changes earlier turns when later ones follow, so the answers before the last "
                    "cannot be located; split the conversation so that each part has a single answer"
                )
            end = next(self._controls(text, len(before)), None)
            if end is None:
                raise UserError("the chat template must write a control token after the last answer to train on it")
            if _letters(message["content"]) not in _letters(text[len(before) : end.start()]):
                if number < len(messages) - 1:  # an earlier turn without its thoughts: see the invariants of `chat`
                    continue
                raise UserError(
                    "the chat template leaves out part of the last answer (usually its thoughts), which then could "
                    "not be trained on; give the model a template that keeps it"
                )
            spans.append((len(before), end.end()))
        return spans

    def _encode(self, text: str, unmask: dict[str, str], cut: str, last: int | None) -> list[int]:
        """Ids of template output after the id `last`: the template's control tokens as ids, masked ones as text. No tag
        forms across a `cut`."""
        ids: list[int] = []
        position = 0
        masks = re.compile("|".join(map(re.escape, unmask)) or "(?!)")
        for match in [*self._controls(text), None]:
            plain = text[position : match.start() if match else None]
            # in one pass: the end of a mask, a digit and the beginning of the next mask look like a mask, too
            plain = masks.sub(lambda mask: unmask[mask.group()], plain)
            for piece in filter(None, plain.split(cut)):
                ids += self.encode(piece, ids[-1] if ids else last)
            if match:
                ids.append(self._control[match.group()])
                position = match.end()
        return ids

    def _controls(self, text: str, start: int = 0):
        """Control tokens in a text, in order; of two that begin at the same place, the longer one."""
        names = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)").finditer(text, start)

    def _mask(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str], str]:
        """Messages without control tokens in their contents, the token of every placeholder, and the mark that splits
        tags which a user typed."""
        contents = "".join(message["content"] for message in messages)
        used = set(contents)
        mark, cut, *_ = *islice((c for c in map(chr, chain(*_PRIVATE)) if c not in used), 2), "", ""
        if not cut:
            raise UserError("the messages hold all of Unicode's private-use characters; leave two of them out")
        unmask = {f"{mark}{n}{mark}": name for n, name in enumerate(self._control) if name in contents}

        def masked(text: str) -> str:
            for mask, name in sorted(unmask.items(), key=lambda pair: -len(pair[1])):
                text = text.replace(name, mask)
            return text

        def of(message: Message) -> str:
            text = masked(message["content"])
            return cut.join(chat.typed_pieces(text)) if self._tags and message["role"] == "user" else text

        return [message | {"content": of(message)} for message in messages], unmask, cut


def add_system(template: str, system: str) -> str:
    """The template, changed so that conversations without a system message start with this one."""
    content = json.dumps(system, ensure_ascii=False)
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + content + "}] + messages -%}"
        "{%- endif -%}" + template
    )


def _letters(text: str) -> str:
    """The text without white space, which templates change around thoughts."""
    return "".join(text.split())


def _tokenizer(spec: dict) -> tokenizers.Tokenizer:
    with patterns.explained():
        tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tok.encode_special_tokens = True  # control tokens inside a text are text
    return tok


def _without_blank(spec: dict, schemes: Sequence[str] | None) -> dict:
    """The spec for text that follows other tokens: no blank is put before it by a `Metaspace` with one of these
    schemes, or, with None, by anything. An added token ends a text, so what follows it is a new one, but not the first.
    """
    spec = spec | {key: deepcopy(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
    parts = [spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}]
    for part in parts:
        parts += [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
        if part.get("type") == "Metaspace" and (schemes is None or part.get("prepend_scheme") in schemes):
            part["prepend_scheme"] = "never"
        if schemes is None:
            part |= {key: value for key, value in (("prepend", ""), ("add_prefix_space", False)) if key in part}
    return spec


def _greedy(added: Sequence[dict]) -> re.Pattern[str] | None:
    """Finds control tokens with the white space that they take; the last group is the token. None if none takes any."""
    if not any(token[side] for token in added if token["special"] for side in ("lstrip", "rstrip")):
        return None
    blank = r"[^\S\x1c-\x1f]"  # Unicode's white space, as the Rust library has it
    before, after = f"(?:(?<!{blank}){blank}+)?", f"{blank}*"  # a run is tried once, from its start
    longest_first = sorted((token for token in added if token["special"]), key=lambda token: -len(token["content"]))
    patterns = (f"{before * t['lstrip']}({re.escape(t['content'])}){after * t['rstrip']}" for t in longest_first)
    return re.compile("|".join(patterns))


def _byte_table(tok: tokenizers.Tokenizer, decoder: dict, added: dict[int, str]) -> list[bytes]:
    """The bytes of each id; empty for ids without a token."""
    kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise UserError("tokenizer.json is neither byte-level nor SentencePiece; no other kind is supported")
    vocab, alphabet = tok.get_vocab(with_added_tokens=True), byte_of_character()
    table = empty_table(vocab)
    for token, i in vocab.items():
        if i in added:
            table[i] = token.encode()
        elif "ByteLevel" in kinds:
            table[i] = bytes(alphabet[character] for character in token)
        else:
            byte = _BYTE.fullmatch(token)
            table[i] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    return table


def _names(directory: Path, config: dict) -> dict[str, str]:
    """The special tokens that the directory names: eos_token, bos_token, ..."""
    older = directory / "special_tokens_map.json"
    named = (read_object(older) if older.is_file() else {}) | config
    texts = {key: token_text(value) for key, value in named.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if isinstance(text, str) and text}


def check_pretokenizer(spec: dict[str, Any], where: str) -> None:
    """Raises UserError unless the tokenizer is exactly byte-level BPE after V3's pre-split."""
    model, splitter, normalizer = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    steps = []
    for step in splitter.get("pretokenizers", [splitter]):
        rule = (step.get("pattern") or {}).get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        options = ("behavior", "invert") if step.get("type") == "Split" else ("add_prefix_space", "use_regex")
        steps.append((step.get("type"), rule, *map(step.get, options)))
    other: tuple[str, ...] = ("dropout", "byte_fallback", "ignore_merges", "unk_token")
    other += ("continuing_subword_prefix", "end_of_word_suffix")
    if (
        model["type"] != "BPE"
        or any(model.get(key) for key in other)
        or normalizer.get("normalizers", normalizer)
        or steps != [*(("Split", rule, "Isolated", False) for rule in SPLITS), ("ByteLevel", "", False, False)]
        or any(token.get(side) for token in spec["added_tokens"] for side in ("lstrip", "rstrip", "single_word"))
    ):
        raise UserError(
            f"{where} is not byte-level BPE with DeepSeek-V3's pre-split, the only kind written as GGUF here; "
            "llama.cpp's convert_hf_to_gguf.py may support it"
        )
