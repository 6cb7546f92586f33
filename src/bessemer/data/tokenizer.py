"""Byte-level BPE with DeepSeek-V3's pre-split (V3 4.1).

Invariants
- `decode(encode(text)) == text` for every text that UTF-8 can encode.
- `encode` adds no BOS or EOS. A control token (`<｜User｜>`) spelled out in a text is encoded as plain text, so a
  document cannot fake a turn; `<think>` and `</think>` are single ids, except where a user typed them (`chat`).
- Training depends only on the texts and the vocabulary size.
- transformers' AutoTokenizer gives the same ids from a saved directory.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bessemer.data import chat
from bessemer.data.chat import ADDED, BOS, EOS, MARKS, NOT_SPECIAL, PAD, THINK, THINK_END, is_special
from bessemer.data.model_files import read_object, read_text
from bessemer.errors import UserError

# V3's three pre-split patterns, in the order of the published tokenizer.json. The first matches up to three digits, the
# second runs of Han and kana; the third keeps a run of punctuation together with the line breaks after it (V3 4.1).
DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = frozenset({DIGITS, CJK, WORDS})
"""The regular expressions of a tokenizer that this module loads; others may explode, so an add-on tries them out."""
TEMPLATE_FILE = "chat_template.jinja"
MAX_IDS = 1 << 24
"""Limit above any id of a published tokenizer; a table has a row for every id."""
SMALLEST = len(ADDED) + 256
"""The added tokens and one token per byte: the smallest byte-level vocabulary."""


class OtherSplit(UserError):
    """A tokenizer.json has regular expressions that are not V3's."""


class Tokenizer:
    """Converts text to ids and back. Create one with `train` or `load`."""

    bos_id: int | None
    """None for another model's tokenizer that writes no BOS (`hf.hf_tokenizer`)."""

    def __init__(self, spec: dict, bos: str, eos: str, pad: str, chat_template: str):
        """`spec` is a parsed tokenizer.json, `chat_template` its Jinja chat template ("" for none)."""
        for token in spec["added_tokens"]:
            token["special"] = token["content"] not in NOT_SPECIAL and (
                token["special"] or is_special(token["content"])
            )
        self.spec = spec
        """The content of tokenizer.json."""
        self._tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tok.encode_special_tokens = True  # control tokens inside a text are text
        self._special = {t["id"] for t in spec["added_tokens"] if t["special"] and t["content"] not in MARKS}
        self._bytes = _byte_table(self._tok, {token["id"]: token["content"] for token in spec["added_tokens"]})
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos_id, self.eos_id, self.pad_id = (self._id(name) for name in (bos, eos, pad))
        self.chat_template = chat_template
        self.fingerprint = fingerprint_of(spec)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, chat_style: str = "zero", tool_tokens: bool = False
    ) -> "Tokenizer":
        """Learn `vocab_size` tokens (including added tokens and bytes) from `texts`. `tool_tokens`: the marks of tool
        calls are tokens too, and follow the other added ones."""
        added = (*ADDED, *MARKS) if tool_tokens else ADDED
        if vocab_size < len(added) + 256:
            raise UserError(
                f"vocab_size {vocab_size} is too small: {len(added)} added tokens and 256 bytes need {len(added) + 256}"
            )
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(rule), "isolated") for rule in (DIGITS, CJK, WORDS)]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tok.decoder = decoders.ByteLevel()
        tok.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(added),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tok.train_from_iterator(texts, trainer)
        tokenizer = cls(json.loads(tok.to_str()), BOS, EOS, PAD, chat.jinja(chat_style))
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(
                f"the texts give only {tokenizer.vocab_size} tokens, not {vocab_size}: no pair occurs twice any more",
                stacklevel=2,
            )
        return tokenizer

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a Hugging Face directory: tokenizer.json, tokenizer_config.json, and chat_template.jinja if present.

        Raises UserError naming the file that is missing or broken.
        """
        directory = Path(directory)
        spec, config = (read_object(directory / name) for name in ("tokenizer.json", "tokenizer_config.json"))
        template = template_of(directory, config)
        bos, eos, pad = (token_text(config.get(f"{kind}_token")) for kind in ("bos", "eos", "pad"))
        if bos is None or eos is None or pad is None:
            raise UserError(f"{directory / 'tokenizer_config.json'} names no bos_token, eos_token or pad_token")
        try:
            if (spec.get("decoder") or {}).get("type") != "ByteLevel" or spec["model"]["type"] != "BPE":
                raise UserError(
                    f"{directory / 'tokenizer.json'} is not a byte-level BPE tokenizer; no other kind is supported"
                )
            if not KNOWN.issuperset(regular_expressions([spec.get("normalizer"), spec.get("pre_tokenizer")])):
                raise OtherSplit(
                    f"{directory / 'tokenizer.json'} does not split text as DeepSeek-V3 does; read it with "
                    "bessemer.hf.families.load_tokenizer, which asks the add-on of other families"
                )
            return cls(spec, bos, eos, pad, template)
        except UserError:
            raise
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{directory / 'tokenizer.json'} is broken ({error}); save the tokenizer again") from error

    def save(self, directory: str | Path) -> None:
        """Write the files that `load`, transformers, vLLM and llama.cpp read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._names,
            # Chat templates write BOS themselves; a tokenizer that also adds it would give two.
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
        }
        if self.chat_template:
            config["chat_template"] = self.chat_template
            (directory / TEMPLATE_FILE).write_text(self.chat_template, "utf-8")
        spec = json.loads(self._tok.to_str())
        for token in spec["added_tokens"]:
            # As in V3's own file, so that decoding in other programs also shows the marks of tools.
            token["special"] &= token["content"] not in MARKS
        (directory / "tokenizer.json").write_text(json.dumps(spec, indent=2, ensure_ascii=False), "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def chat_style(self) -> str | None:
        """The style of `chat` whose template this tokenizer has; None if it has another template or none."""
        return chat.style_of(self.chat_template)

    @chat_style.setter
    def chat_style(self, style: str) -> None:
        self.chat_template = self._jinja(style)

    def _jinja(self, style: str) -> str:
        """The template of a style. Raises UserError if it writes control tokens that this tokenizer lacks."""
        needed = (chat.USER, chat.ASSISTANT) if style == "r1" else ()
        if lacking := [name for name in needed if self._tok.token_to_id(name) is None]:
            raise UserError(
                f'style "{style}" needs the tokens {" and ".join(lacking)}, which this model\'s tokenizer lacks; omit '
                'style to keep the model\'s own template, or set it to "zero" or "r1-zero"'
            )
        return chat.jinja(style)

    def set_system(self, system: str) -> None:
        """Makes the template start every conversation without a system message with this one."""
        raise UserError("a system message needs a model with a chat template of its own kind")

    def switched(self, thinking: bool) -> Self:
        """A copy whose chat template thinks or not, if it has such a switch."""
        return self

    def trimmed(self, text: str) -> str:
        """The text without the white space that control tokens in it take."""
        return text

    @property
    def renders(self) -> bool:
        """Whether conversations can be written: with one of our templates, or with its own."""
        return self.chat_style is not None

    def use_template(self, prompt_template: str) -> None:
        """Switches to the template that a recipe's `prompt_template` names; "model" keeps the present one."""
        if prompt_template != "model":
            self.chat_style = prompt_template

    @property
    def end_id(self) -> int:
        """The id that ends a document; `eos_id` ends an answer, which another model's template may end otherwise."""
        return self.eos_id

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a text or an answer."""
        return [self.eos_id]

    @property
    def opening(self) -> str:
        """The start of the answer that a prompt of `chat` already contains; a completion continues it."""
        return chat.opening(self.chat_style)

    def render_answers(
        self, messages: Sequence[chat.Message], add_generation_prompt: bool = False, every: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Called by `chat` for a tokenizer whose chat template is not one of `chat.STYLES`. With `every` false only the
        last message is marked if it is an answer, so that a prompt costs one rendering."""
        raise UserError(f"this tokenizer has none of Bessemer's chat templates; name a style: {', '.join(chat.STYLES)}")

    @property
    def think_id(self) -> int:
        return self._id(THINK)

    @property
    def think_end_id(self) -> int:
        return self._id(THINK_END)

    def special_id(self, content: str) -> int:
        """The id of an added token such as `chat.USER`. Raises UserError if this tokenizer lacks it."""
        return self._id(content)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Ids of `text` and nothing else; see the invariants at the top. `after`: the id before the text, if it
        continues one; other families' tokenizers put a blank before a text's first word."""
        return self._encoded(self._continuing(after), [text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return self._encoded(self._tok, texts)

    def _continuing(self, after: int | None) -> tokenizers.Tokenizer:
        """The library's tokenizer for a text that follows the id `after`."""
        return self._tok

    @staticmethod
    def _encoded(tok: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in tok.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # the library's error for a text that UTF-8 cannot encode
            for text in texts:
                _check_utf8(text)
            raise

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` drops control tokens. An id beyond
        the vocabulary has no text: embeddings have spare rows, and samplers of others draw them, if rarely."""
        visible = (i for i in ids if i < len(self._bytes) and not (skip_special and i in self._special))
        return b"".join(map(self.token_bytes, visible)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for."""
        if not 0 <= token_id < len(self._bytes):
            raise UserError(f"token id {token_id} is outside the vocabulary of {len(self._bytes)}")
        return self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a control token, which decoding drops. Marks of tools are not: parsers look for them."""
        return token_id in self._special

    @property
    def tool_marks(self) -> dict[str, int]:
        """The ids of `MARKS`; empty if they are not tokens here, and the marks are written as text."""
        ids = {mark: token_id for mark in MARKS if (token_id := self._tok.token_to_id(mark)) is not None}
        return ids if len(ids) == len(MARKS) else {}

    def _id(self, content: str) -> int:
        token_id = self._tok.token_to_id(content)
        if token_id is None:
            raise UserError(f"this tokenizer has no token {content!r}")
        return token_id


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are written as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _byte_table(tok: tokenizers.Tokenizer, added: dict[int, str]) -> list[bytes]:
    """The bytes of every id."""
    byte_of = byte_of_character()
    vocab = tok.get_vocab(with_added_tokens=True)
    table = empty_table(vocab)
    for content, token_id in vocab.items():
        table[token_id] = (
            added[token_id].encode() if token_id in added else bytes(byte_of[character] for character in content)
        )
    return table


def empty_table(vocab: dict[str, int]) -> list[bytes]:
    """A row for every id up to the largest. Raises UserError if that id is absurd."""
    largest = max(vocab.values(), default=0)
    if largest >= MAX_IDS:
        raise UserError(f"a token has the id {largest}; the limit is {MAX_IDS - 1}; download the tokenizer again")
    return [b""] * (largest + 1)


def fingerprint_of(spec: dict) -> str:
    """SHA-256 of everything that determines the ids; a corpus records the fingerprint of its tokenizer."""
    added = [(token["id"], token["content"], token["special"]) for token in spec["added_tokens"]]
    facts = [spec["model"]["vocab"], spec["model"].get("merges"), added, spec["pre_tokenizer"], spec.get("normalizer")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def regular_expressions(value: Any) -> Iterator[str]:
    """Those in a part of tokenizer.json."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for item in value.values():
            yield from regular_expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from regular_expressions(item)


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"a text has a lone surrogate, which UTF-8 cannot express: {error}") from error


def template_of(directory: Path, config: dict[str, Any]) -> str:
    """The Jinja text of a directory's chat template, or "" if there is none; of several, the one named default.
    `config` is its tokenizer_config.json."""
    if (directory / TEMPLATE_FILE).exists():
        return read_text(directory / TEMPLATE_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def token_text(entry: object) -> str | None:
    """The text of a token that a config gives as a string or as an object; None for anything else."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
