"""Curricula: where sections begin, and that none reads a row twice without need."""

import warnings

import numpy as np
import pytest

from bessemer.data import corpus
from bessemer.data.mixture import Curriculum, CurriculumSection, sections
from bessemer.data.rows import open_rows
from bessemer.errors import UserError


def test_curriculum_sections_follow_length_and_keep_their_rows():
    lengths = lambda tokens: 32 if tokens < 1000 else 64  # noqa: E731 (a schedule)
    stretches = sections(2000, lengths, lambda tokens: 256 // lengths(tokens))
    # steps of 256 tokens: four up to 1,024, then four more
    assert stretches == [CurriculumSection(32, 0, 0, 32), CurriculumSection(64, 1024, 32, 16)]


def test_a_step_without_a_row_is_refused():
    with pytest.raises(UserError, match=r"64 tokens.*32 tokens.*batch_rows"):
        sections(2000, lambda tokens: 32, lambda tokens: 1 if tokens < 64 else 0)


@pytest.fixture(scope="module")
def parts_of(documents, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, some in (("a", documents[:200]), ("b", documents[200:])):
        corpus.build(some, tokenizer, 32, folder / name, heldout=0)
    return lambda length: {name: open_rows(folder / name, "train", length) for name in ("a", "b")}


def test_curriculum_sections_continue_reading(parts_of):
    plan = [CurriculumSection(32, 0, 0, 40), CurriculumSection(64, 40 * 32, 40, 20)]
    curriculum = Curriculum(plan, parts_of, {"a": 0.25, "b": 0.75}, seed=1, caps={"a": 50})
    first, second = curriculum.mixtures
    assert curriculum.batch(0, 0, 3).tokens_BT.tolist() == first.batch(0, 3).tokens_BT.tolist()
    later = curriculum.batch(40 * 32, 40, 2).tokens_BT
    assert later.shape == (2, 64) and later.tolist() == second.batch(0, 2).tokens_BT.tolist()
    epochs = first.epochs(40)
    assert curriculum.epochs(40 * 32, 40) == epochs and second.epochs(0) == pytest.approx(epochs, abs=0.02)
    assert second.epochs(20)["a"] > epochs["a"]
    shares = curriculum.realised(60 * 32, 50)  # half of the second section
    read = np.array([40 * 32, 10 * 64])
    expected = np.array([first.realised(0, 40)["a"], second.realised(0, 10)["a"]]) @ read / read.sum()
    assert shares["a"] == pytest.approx(expected) and sum(shares.values()) == pytest.approx(1)


def test_weights_that_are_not_shares_are_reported_once_before_training(parts_of):
    plan = [CurriculumSection(32, 0, 0, 40), CurriculumSection(64, 40 * 32, 40, 20)]
    with pytest.warns(UserWarning, match="sum to 4, not 1"):
        curriculum = Curriculum(plan, parts_of, {"a": 1.0, "b": 3.0}, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert curriculum.batch(40 * 32, 40, 2).tokens_BT.shape == (2, 64)
