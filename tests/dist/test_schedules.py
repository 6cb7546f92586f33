"""Pipeline schedules: complete, deadlock-free, as fast as published, and in torch's order if torch has them."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as theirs

from bessemer.addons.distributed.dualpipe import dualpipe, dualpipe_v
from bessemer.addons.distributed.schedules import (
    SCHEDULES,
    gpipe,
    interleaved,
    of_step,
    one_f_one_b,
    schedule,
    zb1p,
    zbv,
)
from bessemer.addons.distributed.table import Action, Pair, Table, check
from bessemer.addons.distributed.timeline import Costs, as_svg, as_text, label, simulate, summary
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError

# Derived from the figure in V3 3.2.1. P, M, F&B -> makespan, worst idle, held at once, overlapped pairs of ranks
# h = 0, 1, ...
PUBLISHED = [
    (4, 8, 3.0, 26, 2, 5, [3, 3]),
    (4, 20, 2.5, 54, 1.5, 5, [15, 15]),
    (8, 20, 3.0, 66, 6, 9, [9, 10, 11, 11]),
    (8, 20, 2.5, 59, 4.5, 9, [9, 10, 11, 11]),
    (8, 40, 3.0, 126, 6, 9, [29, 30, 31, 31]),
    (16, 120, 3.0, 374, 14, 17, [97, 98, 99, 100, 101, 102, 103, 103]),
]


@pytest.mark.parametrize(("P", "M", "pair", "makespan", "idle", "live", "pairs"), PUBLISHED)
def test_dualpipe_matches_derived_times(P, M, pair, makespan, idle, live, pairs):
    table = dualpipe(P, M)
    check(table)
    actual = simulate(table, Costs(pair=pair))
    assert (actual.makespan, max(actual.idle), max(actual.live)) == (makespan, idle, live)
    assert list(actual.pairs) == pairs + pairs[::-1]
    assert max(actual.idle) == (P / 2 - 1) * (pair + 2 - 3 * 1)  # E.6: (P/2 - 1)(F&B + B - 3W)


def test_dualpipe_with_unequal_costs():
    actual = simulate(dualpipe(8, 20), Costs(forward=2, input=2, weight=1, pair=4.5))
    assert (actual.makespan, max(actual.idle)) == (108, 13.5)


@pytest.mark.parametrize(("R", "M"), [(4, 10), (2, 4), (3, 9), (8, 60)])
def test_dualpipe_v_is_folded_dualpipe(R, M):
    table = dualpipe_v(R, M)
    check(table)
    folded, unfolded = simulate(table, Costs(pair=3)), simulate(dualpipe(2 * R, 2 * M), Costs(pair=3))
    assert folded.makespan == unfolded.makespan and max(folded.idle) == max(unfolded.idle)
    assert folded.live == unfolded.live[:R] and folded.pairs == unfolded.pairs[:R]


@pytest.mark.parametrize(("P", "M"), [(8, 20), (4, 4), (2, 7), (1, 3)])
def test_gpipe_and_1f1b_have_known_bubbles(P, M):
    """E.6 for F = I = W = 1: 1F1B (P-1)(F+B), ZB1P (P-1)(F+B-2W); activations of at most P micro-batches."""
    for make, bubble, live in (
        (gpipe, 3 * (P - 1), M),
        (one_f_one_b, 3 * (P - 1), min(P, M)),
        (zb1p, P - 1, min(P, M)),
    ):
        table = make(P, M)
        check(table)
        actual = simulate(table)
        assert set(actual.idle) == {bubble} and actual.makespan == 3 * M + bubble, table.name
        assert max(actual.live) == live, table.name


def test_interleaving_divides_the_bubble():
    for P, M, V in ((4, 8, 2), (4, 8, 3), (8, 24, 2)):
        table = interleaved(P, M, V)
        check(table)
        assert set(simulate(table).idle) == {3 * (P - 1)}, "in units of a slice, which is a V-th of a stage"


@pytest.mark.parametrize(("R", "M"), [(4, 8), (8, 20), (4, 7), (2, 3), (1, 1)])
def test_zbv_is_never_idle_in_the_middle(R, M):
    table = zbv(R, M)
    check(table)
    actual = simulate(table)
    assert set(actual.idle) == {R - 1} and max(actual.live) <= 2 * R
    for spans in actual.spans:
        assert all(a.end == b.start for a, b in pairwise(spans))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), ranks=st.integers(1, 9), micro=st.integers(1, 40))
def test_every_table_is_complete_and_deadlock_free(name, ranks, micro):
    try:
        table = schedule(name, ranks, micro)
    except UserError as refused:
        assert name in str(refused) or "interleaved" in str(refused)
        return
    check(table)
    timeline = simulate(table, Costs(1.0, 1.5, 0.7))
    work = table.per_lane * table.lanes * table.stages * 3.2
    assert sum(timeline.idle) == pytest.approx(timeline.makespan * ranks - work)


# --- torch's tables ----------------------------------------------------------------------------------------------


def torch_order(kind, ranks, slices, micro, place):
    """pipeline_order of one of torch's schedules, for stages that are mere numbers."""
    stages = [
        SimpleNamespace(
            num_stages=ranks * slices, group_size=ranks, group_rank=0, stage_index=i, group=None, has_backward=True,
            device="cpu", is_first=i == 0, is_last=i == ranks * slices - 1, submod=torch.nn.Linear(1, 1),
            stage_index_to_group_rank=None,
        )
        for i, rank in enumerate(place) if rank == 0
    ]  # fmt: skip
    orders = kind(stages, micro, loss_fn=lambda *a: 0).pipeline_order
    return [
        [re.sub("OVERLAP_F_B", "", str(step)) for step in orders[rank] if step is not None] for rank in range(ranks)
    ]


def like_torch(step):
    if isinstance(step, Pair):
        return f"({like_torch(step.forward)};{like_torch(step.backward)})"
    return f"{step.stage}{step.kind}{step.micro}"


@pytest.mark.parametrize(
    ("make", "kind", "sizes"),
    [
        (interleaved, theirs.ScheduleInterleaved1F1B, [(4, 8), (2, 6), (3, 9)]),
        (zbv, theirs.ScheduleZBVZeroBubble, [(4, 8), (3, 12), (2, 4)]),
        (dualpipe_v, theirs.ScheduleDualPipeV, [(4, 8), (3, 10), (2, 4)]),
    ],
    ids=["interleaved", "zbv", "dualpipe-v"],
)
def test_order_matches_torch_schedules(make, kind, sizes):
    for ranks, micro in sizes:
        table = make(ranks, micro)
        expected = torch_order(kind, ranks, 2, micro, table.place[0])
        assert [[like_torch(step) for step in steps] for steps in table.steps] == expected


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "micro", "words"),
    [
        ("dualpipe", 5, 20, "even number of pipeline ranks, not 5; use 6"),
        ("dualpipe", 4, 6, "at least 8, not 6; use 8"), ("dualpipe", 4, 11, "not 11; use 12"),
        ("dualpipe-v", 4, 7, "at least 8 micro-batches, not 7"), ("zbv", 4, 6, "at least 7 micro-batches"),
        ("interleaved", 4, 10, "multiples of 4, not 10; use 12"), ("1f1b", 0, 4, "at least one rank"),
        ("dualpip", 4, 8, 'did you mean "dualpipe"'), ("best", 4, 8, "known: gpipe, 1f1b"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused(name, ranks, micro, words):
    with pytest.raises(UserError, match=re.escape(words)):
        schedule(name, ranks, micro)


def test_broken_tables_are_detected():
    good = one_f_one_b(2, 2)

    def changed(*steps):
        return Table("x", good.stages, good.place, good.micro, steps)

    first, last = good.steps
    with pytest.raises(AssertionError, match="micro-batch 1 of lane 0: F"):
        check(changed(first[:-1], last))
    with pytest.raises(AssertionError, match="twice"):
        check(changed((*first, first[-1]), last))
    with pytest.raises(AssertionError, match="not rank 1's"):
        check(changed(first[:-1], (*last, first[-1])))
    with pytest.raises(AssertionError, match="deadlock"):
        check(changed(first, tuple(reversed(last))))
    with pytest.raises(AssertionError, match="Pair"):
        check(changed((Pair(first[-1], first[0]), *first[1:-1]), last))


# --- pictures ----------------------------------------------------------------------------------------------------


def test_text_shows_the_timeline():
    table = zb1p(3, 4)
    lines = as_text(simulate(table)).splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"] and len({len(line.rstrip()) for line in lines}) == 1
    words = [re.findall(r"[FBIW]\d+", line) for line in lines]
    assert words == [[label(step) for step in steps] for steps in table.steps]
    assert label(Pair(Action("F", 0, 3), Action("B", 3, 1, 1))) == "F3&b1"
    assert "idle at most 2 per rank" in summary(table, simulate(table))


def test_svg_places_every_action():
    table = dualpipe(4, 8)
    timeline = simulate(table)
    tree = ElementTree.fromstring(as_svg(table, timeline))
    titles = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(
        f"{label(span.step)}: {span.start:g}–{span.end:g}" for row in timeline.spans for span in row
    )
    boxes = [element for element in tree.iter("{http://www.w3.org/2000/svg}rect") if "x" in element.attrib]
    assert max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in boxes) <= 1600


def test_guide_example_is_dualpipe():
    """For every pre-training step of the command that promises it; with larger micro-batches it would be 1F1B."""
    root = Path(__file__).parents[2]
    (line,) = (line for line in (root / "docs/guide.md").read_text().splitlines() if line.endswith("with DualPipe"))
    words = shlex.split(line, comments=True)
    assert words[:2] == ["bessemer", "run"]
    settings = [after for word, after in pairwise(words) if word == "--set"]
    recipe = Recipe.load(words[2], settings)
    pretrain, layout = recipe.stage("pretrain"), recipe.layout

    def used(micro_rows):
        pipelines = layout.fewest // layout.pp
        return {
            of_step(layout.schedule, layout.pp, -(-int(n) // (pipelines * micro_rows)))[0]
            for n in pretrain.batch_rows.values
        }

    assert used(pretrain.micro_rows) == {"dualpipe"} and used(8) == {"1f1b"}
