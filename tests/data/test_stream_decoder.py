"""Text as it streams: whole characters, and together what `decode` gives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.serve.reasoning_parser import StreamDecoder


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=30), st.booleans())
def test_streamed_pieces_join_to_decode(tokenizer, ids, skip):
    """For any ids, valid UTF-8 or not."""
    stream = StreamDecoder(tokenizer, skip)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


def test_stream_holds_a_character_back_until_it_is_whole(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert stream.flush() == ""
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
