"""The special tokens of the DeepSeek family, spelled once (reference B.6).

The bars are U+FF5C and the underscores U+2581, as in the published tokenizer. Their position in `ADDED` is their id
in a tokenizer of our own training; a tokenizer read from elsewhere keeps its own ids.

`<think>`, `</think>` and R1-Zero's `<answer>`, `</answer>` are added tokens that are *not* special: each is one id
wherever it stands in a text, and decoding with `skip_special` keeps it, because reasoning parsers look for it. The
answer tags are ours: V3's pre-split would glue the colon of `Assistant:` to a `<` that follows it, so that a prompt
ending in a colon could never lead to an answer without thoughts.
"""

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


def is_special(content: str) -> bool:
    """Whether an added token is control, not text. The hub's own files leave `<｜User｜>` unmarked; the bars tell."""
    return content.startswith("<｜") and content.endswith("｜>")
