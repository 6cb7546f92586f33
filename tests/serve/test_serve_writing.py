"""An answer's text: whole characters, no part of a stop string, thoughts separate from content."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.serve.events import event
from bessemer.addons.serve.models import Vocabulary
from bessemer.addons.serve.reasoning_parser import ReasoningParser
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import StopStrings, cut_at_stop

TOKENIZER = Tokenizer.train(["the quick brown fox", "<think>two</think> <answer>4</answer>", "盛钢水"] * 8, 290)
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30)
STOPS = st.lists(st.text("abfox <think>/\n盛", min_size=1, max_size=4), max_size=3)


def generated(ids, stops):
    """What the engine would have generated of these ids: it ends with the token that completes a stop string."""
    for n in range(len(ids)):
        if any(stop in TOKENIZER.decode(ids[: n + 1]) for stop in stops):
            return ids[: n + 1]
    return ids


def hits(stop, ids):
    """The places of the tokens that complete a stop string."""
    tail, positions = b"", []
    for i, token in enumerate(ids):
        tail, hit = stop.after(tail, token)
        positions += [i] * hit
    return positions


def written(ids, tokenizer=TOKENIZER, stops=(), **options):
    """(thought, content, the single deltas) of a whole answer."""
    parser = ReasoningParser(tokenizer, stops, **options)
    deltas = [delta for i in ids for delta in parser.push(i)] + parser.end()
    join = lambda kind: "".join(delta.text for delta in deltas if delta.thinking is kind)  # noqa: E731
    return join(True), join(False), deltas


@settings(max_examples=300, deadline=None)
@given(IDS, STOPS)
def test_output_ends_before_the_first_stop_string(ids, stops):
    ids = generated(ids, stops)
    _, content, _ = written(ids, stops=stops, split=False)
    assert content == cut_at_stop(TOKENIZER.decode(ids), stops)


@settings(max_examples=500, deadline=None)
@given(IDS, STOPS.filter(bool))
def test_a_stop_string_is_found_at_the_token_that_completes_it(ids, stops):
    """Against a search of all bytes, before and after every token."""
    stop, text = StopStrings(TOKENIZER, stops), [b""]
    for i in ids:
        text.append(text[-1] + (b"" if TOKENIZER.is_special(i) else TOKENIZER.token_bytes(i)))
    count = [sum(raw.startswith(s.encode(), n) for s in stops for n in range(len(raw))) for raw in text]
    assert hits(stop, ids) == [n for n in range(len(ids)) if count[n + 1] > count[n]]


def test_a_stop_string_may_have_control_tokens_inside():
    """They have no text, so the answer that is shown contains the stop string."""
    (a,), (b,), end = TOKENIZER.encode("a"), TOKENIZER.encode("b"), TOKENIZER.eos_id
    ids, stop = [a, end, end, b], StopStrings(TOKENIZER, ["ab"])
    assert hits(stop, ids) == [3] and written(ids, stops=["ab"])[:2] == ("", "")
    assert hits(stop, [a, end, a, end, b, b]) == [4] and not hits(stop, [end, b])


@settings(max_examples=300, deadline=None)
@given(st.text("abfox 盛钢\n", max_size=20), st.text("abfox 盛钢\n", max_size=20), STOPS)
def test_thought_and_content_are_separated(thought, content, stops):
    stops = [stop for stop in stops if not set(stop) & set("</think>")]
    for opened in (True, False):
        ids = TOKENIZER.encode(("" if opened else "<think>") + thought + "</think>" + content)
        ids = generated(ids, stops)
        shown, _, rest = cut_at_stop(TOKENIZER.decode(ids), stops).removeprefix("<think>").partition("</think>")
        actual = written(ids, stops=stops, thinking=opened)
        assert actual[:2] == (shown.strip(), rest.lstrip())
    assert written(TOKENIZER.encode("two</think>4"), stops=["</think>"], thinking=True)[:2] == ("two", "")


class Plain:
    """A foreign tokenizer: the tags are text, here split into letters."""

    think_id = property(lambda self: TOKENIZER.special_id("<no such token>"))
    think_end_id = think_id
    is_special, token_bytes = TOKENIZER.is_special, TOKENIZER.token_bytes


LETTERS = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}


@settings(max_examples=300, deadline=None)
@given(st.text("ab <think>/\n", max_size=12), st.text("ab <think>/\n", max_size=12), STOPS, st.booleans())
def test_tags_that_are_text(thought, content, stops, opened):
    """A thought only at the very beginning, ended by the first closing tag; anything that is not a tag is shown."""
    stops = [stop for stop in stops if not set(stop) & set("</think>")]
    text = ("" if opened else "<think>") + thought + "</think>" + content
    ids = generated([LETTERS[bytes([byte])] for byte in text.encode()], stops)
    shown, _, rest = (
        cut_at_stop(TOKENIZER.decode(ids), stops).removeprefix("" if opened else "<think>").partition("</think>")
    )
    assert written(ids, Plain(), stops=stops, thinking=opened)[:2] == (shown.strip(), rest.lstrip())
    plain = [LETTERS[bytes([byte])] for byte in f"x{text}".encode()]
    assert written(plain, Plain())[:2] == ("", "x" + text)
    for beginning in ("<th", " \n<think", "<thing"):
        assert written([LETTERS[bytes([byte])] for byte in beginning.encode()], Plain())[1] == beginning.lstrip()


def test_text_is_delayed_no_longer_than_necessary():
    parser = ReasoningParser(TOKENIZER, ["fox jumps"], split=False)
    out = [[delta.text for delta in parser.push(i)] for c in "a fox jumped" for i in TOKENIZER.encode(c)]
    assert out[:3] == [["a"], [" "], []] and out[10] == ["fox jumpe"] and out[11] == ["d"]


def test_characters_are_never_split():
    byte = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    _, _, deltas = written([byte[bytes([b])] for b in "é钢🔥".encode()], split=False)
    assert [delta.text for delta in deltas] == ["é", "钢", "🔥"]
    half = [byte["钢".encode()[:1]], TOKENIZER.think_end_id, byte[b"a"]]
    assert written(half, thinking=True)[:2] == ("\ufffd", "a")


def test_an_event_is_one_line_for_every_client():
    text = "a\u2028b\u2029c\x85d\r\ne盛"
    data = event({"text": text})
    assert data.endswith(b"\n\n") and len(data.decode()[:-2].splitlines()) == 1
    assert json.loads(data[6:]) == {"text": text} and "盛" in data.decode()


def test_tokens_have_names_of_their_own():
    vocabulary = Vocabulary(TOKENIZER)
    names = [vocabulary.name(i) for i in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names) and "bytes:\\xe9" in names and "<think>" in names
    assert vocabulary.longest == len("<｜begin▁of▁sentence｜>".encode())
