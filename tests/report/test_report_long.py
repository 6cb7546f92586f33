"""Long contexts on the report card: every figure of long.json is on the page, and a loss beyond the bound is marked."""

import json

import pytest
from chinese_pages import untranslated

from bessemer.addons.evals import tables
from bessemer.addons.watch import card

RECIPE = """name = "long"
seed = 7
[[stage]]
kind = "longeval"
name = "longeval"
"""


def cells(*shares):
    return [
        {"depth": d, "n": 20, "correct": round(20 * s), "share": s} for d, s in zip((0.0, 1.0), shares, strict=True)
    ]


def positions(*bits):
    ends = (64, 128, 256)
    return [
        {"first": e // 2, "end": e, "n": 9, "nats": 2.0, "bits_per_byte": b} for e, b in zip(ends, bits, strict=True)
    ]


@pytest.fixture
def root(tmp_path):
    results = {
        "needle/before/256": cells(0.95, 1.0), "needle/before/1024": cells(0.05, 0.15),
        "positions/before/plays": positions(2.5, 2.4, 3.9), "short/before/plays": 2.31, "short/before/<b>fables": 2.11,
        "needle/after/256": cells(0.9, 0.9), "needle/after/1024": cells(0.85, 1.0),
        "positions/after/plays": positions(2.5, 2.4, 2.3), "short/after/plays": 2.45, "short/after/<b>fables": 2.29,
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text(RECIPE)
    folder = tmp_path / "01-longeval"
    folder.mkdir()
    (folder / tables.LONG_FILE).write_text(json.dumps(tables.long_table(results, 0.1)))
    (folder / "done.json").write_text(json.dumps({"seconds": 3.0, "summary": {}}))
    return tmp_path


def test_what_was_measured_is_on_the_page(root):
    html = card.write(root).read_text(encoding="utf-8")
    assert untranslated(html, "long longeval before after plays fables") == []
    section = html[html.index('<section id="long">') :]
    section = section[: section.index("</section>")]
    for figure in (
        ">95<",
        ">5<",
        ">85<",
        ">15<",
        "92.5 % at 1,024",
        "10.0 % at 1,024",
        "to 256",
        "3.9",
        "2.310",
        "20 problems per cell",
    ):
        assert figure in section, figure
    assert section.count("<svg ") == 3  # two heat maps, one chart of losses
    assert "&lt;b&gt;fables" in section and "<b>fables" not in section
    assert section.count("beyond the bound") == 1 and "+0.1600" in section  # mean of 0.14 and 0.18


def test_a_terminal_gets_the_figures(root):
    text = card.table(root)
    assert [line.split()[-4:] for line in text.splitlines() if line.startswith(("before", "after"))] == [
        ["97.5", "%", "10.0", "%"],
        ["90.0", "%", "92.5", "%"],
        ["byte", "on", "short", "rows"],
    ]
    assert "+0.1600 bits per byte" in text


def test_a_share_of_none_or_all_has_an_interval():
    none, all_ = tables.needles_found(cells(0.0, 0.0)), tables.needles_found(cells(1.0, 1.0))
    assert (none["share"], none["low"], all_["share"], all_["high"]) == (0.0, 0.0, 1.0, 1.0)
    assert 0.05 < none["high"] < 0.1 and 0.9 < all_["low"] < 0.95  # 40 problems: the bound is about 1 - 0.05^(1/40)


def test_a_run_without_a_long_context_evaluation_has_no_section_on_it(root):
    (root / "01-longeval" / tables.LONG_FILE).unlink()
    html = card.write(root).read_text(encoding="utf-8")
    assert '<section id="long">' not in html and "long context (no long.json" in html
