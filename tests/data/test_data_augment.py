"""FIM and split boundaries: the text is kept, the rates are met, the held-out side is untouched."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bessemer.data import chat, corpus
from bessemer.data.corpus import Augment, boundary_tokens
from bessemer.hf.families import load_tokenizer


def test_fim_is_prefix_suffix_middle_of_the_same_text(tokenizer, texts):
    augment = Augment(tokenizer, fim_rate=1.0, boundary_split_rate=0.0)
    begin, hole, end = (tokenizer.special_id(x) for x in (chat.FIM_BEGIN, chat.FIM_HOLE, chat.FIM_END))
    for text in texts[:50]:
        ids = augment(text, tokenizer.encode(text))
        assert ids[0] == begin
        at_hole, at_end = ids.index(hole), ids.index(end)
        prefix, suffix, middle = ids[1:at_hole], ids[at_hole + 1 : at_end], ids[at_end + 1 :]
        assert tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix) == text


def test_fim_meets_its_rate_and_depends_on_text_and_seed_only(tokenizer):
    texts = [f"document number {n} of many" for n in range(2000)]
    begin = tokenizer.special_id(chat.FIM_BEGIN)

    def chosen(seed):
        augment = Augment(tokenizer, 0.1, 0.0, seed)
        return [augment(text, ids)[0] == begin for text, ids in zip(texts, encoded, strict=True)]

    encoded = tokenizer.encode_batch(texts)
    assert 150 < sum(chosen(0)) < 250  # 200 expected, standard deviation 13
    assert chosen(0) == chosen(0) != chosen(1)


def test_boundary_tokens_split_into_mark_and_line_breaks(tokenizer):
    table = boundary_tokens(tokenizer)
    (dot,) = tokenizer.encode(".\n")
    assert [tokenizer.token_bytes(i) for i in table[dot]] == [b".", b"\n"]
    for token, halves in table.items():
        assert b"".join(map(tokenizer.token_bytes, halves)) == tokenizer.token_bytes(token)
        assert len(halves) >= 2


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_leading_blank_tokenizers_add_no_blank_inside_a_text(tmp_path, scheme):
    vocabulary = {piece: n for n, piece in enumerate(("<unk>", "</s>", *"▁hi.\n", ".\n"))}
    tok = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "\n")], unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Metaspace(prepend_scheme=scheme)
    marks = (chat.FIM_BEGIN, chat.FIM_HOLE, chat.FIM_END)
    tok.add_special_tokens([AddedToken(name) for name in ("</s>", *marks)])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    foreign = load_tokenizer(tmp_path)
    assert boundary_tokens(foreign) == {vocabulary[".\n"]: [vocabulary["."], vocabulary["\n"]]}
    ids = Augment(foreign, 1.0, 0.0)("hi.\nhi", foreign.encode("hi.\nhi"))
    spelled = foreign.decode(ids, skip_special=False)
    for mark in marks:
        spelled = spelled.replace(f"{mark} ", mark) if scheme == "always" else spelled
    assert " " not in spelled and ids == tok.encode(spelled, add_special_tokens=False).ids


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_split_boundaries_meet_their_rate_and_keep_the_text(tokenizer, texts, rate):
    augment = Augment(tokenizer, 0.0, rate)
    table = boundary_tokens(tokenizer)
    before = after = 0
    for text in texts:
        ids = tokenizer.encode(text)
        split = augment(text, ids)
        assert tokenizer.decode(split) == text
        before += sum(i in table for i in ids)
        after += sum(i in table for i in split)
    assert before > 1000
    assert (before - after) / before == pytest.approx(rate, abs=0.03)


def test_the_heldout_side_is_left_alone(documents, tokenizer, tmp_path):
    plain = corpus.build(documents, tokenizer, 64, tmp_path / "a", heldout=0.1)
    changed = corpus.build(documents, tokenizer, 64, tmp_path / "b", heldout=0.1, fim_rate=0.5, boundary_split_rate=0.5)
    assert changed.heldout.facts["shards"] == plain.heldout.facts["shards"]
    assert changed.train.facts["shards"] != plain.train.facts["shards"]
    assert changed.train.facts["bytes"] == plain.train.facts["bytes"]
