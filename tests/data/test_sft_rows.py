"""Conversations in rows: only answers count, samples do not see each other, nothing is cut, each row once an epoch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bessemer.config.training import SFTConfig
from bessemer.data import chat, sft_rows
from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token

ROW = 160


def conversation(number, rounds=1):
    messages = [{"role": "system", "content": "be brief"}] if number % 3 == 0 else []
    for turn in range(rounds):
        messages += [
            {"role": "user", "content": f"what is {number}+{turn}?"},
            {"role": "assistant", "content": f"<think>{number}+{turn}={number + turn}</think>it is {number + turn}"},
        ]
    return Document("", "mine", tuple(messages))


CONVERSATIONS = [conversation(n, rounds=1 + (n % 5 == 0)) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [message["content"] for document in CONVERSATIONS for message in document.messages]
    return Tokenizer.train(texts * 3, 300)


@pytest.fixture(scope="module", params=["zero", "r1"])
def packed(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    facts = sft_rows.build(CONVERSATIONS, tokenizer, ROW, folder, request.param)
    return request.param, facts, sft_rows.load(folder, seed=3)


def samples_of(batch):
    """(ids, trained) of every sample of a batch, padding dropped."""
    for row in range(batch.n_rows):
        for segment in batch.segments_BT[row].unique():
            in_segment = batch.segments_BT[row] == segment
            yield batch.tokens_BT[row, in_segment].tolist(), batch.loss_BT[row, in_segment].bool().tolist()


def test_every_sample_once_whole_and_with_its_answers_marked(packed, tokenizer):
    style, facts, rows = packed
    expected = [chat.render_answers(tokenizer, document.messages, style) for document in CONVERSATIONS]
    samples_read = []
    for ids, trained in samples_of(rows.batch(0, rows.n_rows)):
        end = max(i for i, token in enumerate(ids) if token == tokenizer.eos_id) + 1
        assert not any(trained[end:]) and set(ids[end:]) <= {tokenizer.pad_id}
        samples_read.append((ids[:end], trained[:end]))
    assert sorted(samples_read) == sorted(expected)
    assert facts["samples"] == 40 and facts["too_long"] == 0
    assert facts["multi_turn"] == sum(len(document.messages) > 3 for document in CONVERSATIONS) > 0
    assert facts["answer_tokens"] == sum(sum(answers) for _, answers in expected)
    assert facts["waste"] == pytest.approx(1 - facts["tokens"] / (facts["rows"] * ROW))


def test_marked_tokens_are_the_assistants_own(packed, tokenizer):
    _, _, rows = packed
    ids, trained = next(iter(samples_of(rows.batch(0, 1))))
    answer_text = tokenizer.decode(
        [token for token, is_trained in zip(ids, trained, strict=True) if is_trained], skip_special=True
    )
    assert "it is" in answer_text and "what is" not in answer_text and "be brief" not in answer_text


def test_a_sample_does_not_feel_its_neighbours(packed):
    """A row's loss is the sum of its samples' losses alone."""
    _, _, rows = packed
    cfg = preset("tiny", vocab_size=300, dim=32, n_layers=2, n_heads=2, inter_dim=64, moe_inter_dim=16)
    model = Transformer(cfg).initialise(0)
    batch = next(b for n in range(rows.n_rows) if (b := rows.batch(n, 1)).segments_BT.max() > 1)
    loss_of_row = next_token(model, batch, mtp_lambda=0.3, balance_alpha=0.0).total
    alone = torch.zeros(())
    for segment in batch.segments_BT.unique():
        only = batch.segments_BT[0] == segment
        part = replace(
            batch, tokens_BT=batch.tokens_BT[:, only], loss_BT=batch.loss_BT[:, only],
            segments_BT=batch.segments_BT[:, only],
        )  # fmt: skip
        alone = alone + next_token(model, part, mtp_lambda=0.3, balance_alpha=0.0).total
    assert loss_of_row.item() == pytest.approx(alone.item(), rel=1e-5)


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own(packed):
    _, _, rows = packed
    n = rows.n_rows
    orders = []
    for epoch in range(3):
        read = [rows.batch(epoch * n + i, 1).tokens_BT[0].tolist() for i in range(n)]
        assert sorted(read) == sorted(rows._batch(np.asarray(rows.packed_RT)).tokens_BT.tolist())
        orders.append(read)
    assert orders[0] != orders[1] != orders[2]
    across = rows.batch(n - 1, 2).tokens_BT.tolist()
    assert across == [orders[0][-1], orders[1][0]]


def test_what_does_not_fit_is_left_out_and_counted(tokenizer, tmp_path):
    long = conversation(1, rounds=9)
    facts = sft_rows.build([*CONVERSATIONS, long], tokenizer, ROW, tmp_path / "a", "zero")
    assert (facts["samples"], facts["too_long"]) == (40, 1)
    with pytest.raises(UserError, match=r"conversations.*160 tokens.*row_length"):
        sft_rows.build([long], tokenizer, ROW, tmp_path / "b", "zero")
    with pytest.raises(UserError, match="not a single conversation"):
        sft_rows.build([], tokenizer, ROW, tmp_path / "c", "zero")


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (Document("just text", "mine"), "is plain text; SFT needs messages"),
        (Document("", "mine", ({"role": "user", "content": "hm?"},)), "does not end with an answer"),
    ],
)
def test_records_that_teach_nothing_are_refused(tokenizer, tmp_path, document, complaint):
    with pytest.raises(UserError, match=complaint):
        sft_rows.build([document], tokenizer, ROW, tmp_path / "a", "zero")


def test_a_damaged_directory_is_named(tokenizer, tmp_path):
    sft_rows.build(CONVERSATIONS, tokenizer, ROW, tmp_path, "zero")
    facts = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(facts | {"rows": facts["rows"] + 1}))
    with pytest.raises(UserError, match=r"packed conversations .*delete it"):
        sft_rows.load(tmp_path, 0)


@pytest.mark.parametrize("examples", [1, 3, 7, 1000])
def test_steps_of_a_number_of_conversations(packed, examples):
    """Steps follow each other without a gap, and each ends with the first row whose conversations reach its goal."""
    _, facts, rows = packed
    of_step, row, ends, epochs = rows.rows_of_steps(examples, 2), 0, [], 2
    while row < epochs * rows.n_rows:
        assert of_step(row) >= 1
        row += of_step(row)
        ends.append(row)
    assert row == epochs * rows.n_rows
    counts = [len(list(samples_of(rows.batch(n, 1)))) for n in range(row)]
    goals = [sum(counts[:end]) // examples for end in ends]
    assert goals[:-1] == sorted(set(goals[:-1])), "every step passes a goal of its own"
    assert all(sum(counts[: end - 1]) // examples < sum(counts[:end]) // examples for end in ends[:-1])
    assert sum(counts) == 2 * facts["samples"]


@pytest.mark.parametrize(
    ("n_rows", "set_by_hand", "expected"),
    [
        (1, {}, (10, 1)), (4, {}, (5, 1)), (10, {}, (2, 1)), (40, {}, (2, 4)), (80, {}, (2, 8)), (5000, {}, (2, 8)),
        (40, {"epochs": 1}, (1, 2)), (40, {"batch_rows": 8}, (4, 8)), (4, {"epochs": 2, "batch_rows": 8}, (2, 8)),
        (4, {"batch_examples": 8}, (10, 4.0)),
    ],
)  # fmt: skip
def test_default_steps_are_twenty_where_possible(n_rows, set_by_hand, expected):
    config = SFTConfig(kind="sft", lr=1e-3, lr_final=1e-4, **set_by_hand)
    rows = sft_rows.SFTRows(np.zeros((n_rows, ROW), sft_rows.DTYPE), {"samples": 2 * n_rows}, 0)
    assert sft_rows.fitted(rows, config) == expected
