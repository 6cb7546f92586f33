"""The text of ids that arrive one by one."""

import codecs

from bessemer.data.tokenizer import Tokenizer


class StreamDecoder:
    """Decode ids one by one. The pieces join to `decode` of all ids, and no piece ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The text left at the end: U+FFFD for an unfinished character, otherwise empty."""
        return self._utf8.decode(b"", final=True)
