"""Every card's sources can be followed, and no number is typed into a sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from bessemer_claims import credibility, phrases, planned, registry, sentences
from bessemer_claims.registry import read_toml
from bessemer_claims.verdict import Measured

ROOT = Path(__file__).parents[1]


def rows():
    """Every row of a data file that cites: (where, what it cites)."""
    yield from ((name, written) for name, claim in registry.claims().items() for written in claim.source)
    for file in ("reports.toml", "reference.toml"):
        table = read_toml(file)
        listed = table["run"] if "run" in table else table.values()
        yield from ((file, row["source"]) for row in listed)


def test_every_source_that_is_cited_can_be_followed():
    cited = {where: registry.citation(written) for where, written in rows()}
    assert all(one.source.url for one in cited.values()) and all(one.source.title for one in cited.values())
    used = {registry.citation(written).key for _, written in rows()}
    unused = set(registry.sources()) - used - {"account", "qwen3"}
    assert not unused, "listed and cited nowhere"
    urls = [source.url for source in registry.sources().values() if source.url]
    assert len(urls) == len(set(urls))


def test_what_documents_decide_names_a_document():
    for name, claim in registry.claims().items():
        assert bool(claim.audit or claim.scores) <= bool(claim.source), name


def test_one_form_of_citing():
    one = registry.citation("v3: Table 1, 3.3.2, Appendix B.1")
    assert one.label(0) == "V3 technical report, Table 1, section 3.3.2, Appendix B.1"
    assert one.label(1) == "V3 技术报告，表 1，3.3.2 节，附录 B.1"
    assert registry.citation("nature: Supplementary Table 7").label(1).endswith("补充表 7")


@pytest.mark.parametrize(
    ("written", "words"),
    [("v4: Table 1", "no source 'v4'.*did you mean"), ("v3: somewhere", "is no place in a source")],
)
def test_a_citation_that_leads_nowhere(written, words):
    with pytest.raises(ValueError, match=words):
        registry.citation(written)
    entry = dict(kinds="A", experiment="E1", text=["a", "b"], paper="", found=["a", "b"], source=[written])
    with pytest.raises(ValidationError, match=words):
        registry.ClaimEntry(**entry)


def test_an_audit_needs_a_source():
    with pytest.raises(ValidationError, match="needs a source"):
        registry.ClaimEntry(kinds="A", experiment="E1", text=["a", "b"], paper="", audit="holds", found=["a", "b"])


NAMES = (
    r"\{[^}]*\}",  # computed
    r"(?<![A-Za-z0-9])[HMLTFPGZRDK]\d{1,2}(?!\d)",  # cards; R1 too
    r"(?<![A-Za-z])(V2|V3|o1|GPT-4|Llama \d(\.\d)?|H100|H800|405B|1F1B|ZB1P)(?![A-Za-z0-9])",
    r"(FP|BF|float)\d+|Inflection-2|SHA-256|pass@1|[Rr]ules \d|python3",
    r"20\d\d 年 \d+ 月|(?<!\d)(19|20)\d\d(?!\d)",  # years and months
)
"""All that may hold a digit in a sentence: computed numbers, cards, names, years."""


def typed(text):
    for name in NAMES:
        text = re.sub(name, "", text)
    return re.findall(r"[^ ]*\d[^ ]*", text)


def strings(entry):
    """All strings in a table of words.toml."""
    if isinstance(entry, str):
        return [entry]
    return [text for inner in (entry.values() if isinstance(entry, dict) else entry) for text in strings(inner)]


def test_no_number_is_typed_into_a_sentence():
    """Claims and published figures are quoted, with their source; everything else that has a number computes it."""
    texts = {
        f"{name}.{field}": text
        for name, claim in registry.claims().items()
        for field in ("found", "seen", "limit")
        for text in getattr(claim, field) or ()
    }
    for name, experiment in registry.experiments().items():
        texts |= {f"{name}.{n}": text for n, text in enumerate([*experiment.does, *experiment.limit])}
    for name, entry in phrases.words().items():
        if name not in ("word", "commands", "unit"):  # definitions, what to type, how numbers are written
            texts |= {f"{name}.{text}": text for text in strings(entry)}
    assert {where: typed(text) for where, text in texts.items() if typed(text)} == {}
    assert typed("about 9 to 31 % in V3's {n} runs of 2024, see M12 and FP8") == ["9", "31"], "the test can fail"


def test_percent_in_chinese_has_no_space():
    for name, claim in registry.claims().items():
        texts = (claim.text, claim.found, claim.seen, claim.limit)
        assert not any(re.search(r"[ \u202f]%", text[1]) for text in texts if text), name


def test_a_sentence_about_runs_waits_for_them():
    text = ["{run[a - b, points].mean:.0f*100} of {n}", "{n}：{run[a - b, points].low:+.1f}"]
    run = sentences.RunValues.of({"a - b, points": Measured([0.1, 0.2, 0.3])}, 0.95)
    assert sentences.filled(text, {"n": 3, "run": run})[0] == "20 of 3"
    with pytest.raises(sentences.MissingRun):
        sentences.filled(text, {"n": 3, "run": sentences.RunValues()})


def test_the_cost_is_bounded_by_all_that_is_listed():
    """NVIDIA's benchmark by hand; small networks count for one bound and not for the other."""
    one, bounds = planned.independent(), planned.bounds()
    assert one["nvidia_share"] == pytest.approx(100 * 1297 / (14.8e12 / 2.664e6 / 3600))
    assert (round(one["nvidia_usd"], 1), round(one["own_usd"], 1)) == (6.3, 5.3)
    assert one["nvidia_tiles_usd"] == pytest.approx(one["nvidia_usd"] * 338 / 330)
    runs = credibility.reference()
    large = {run["name"] for run in runs if not run["small"]}
    assert all(run["active"] > 10e9 for run in runs if run["name"] in large)
    assert all(run["active"] < 10e9 for run in runs if run["name"] not in large)
    worst = max(runs, key=lambda run: run["v3_hours"])
    assert worst["small"] and bounds["spread_all"] == pytest.approx(worst["v3_hours"] / 2.664)
    assert 1 < bounds["spread"] < bounds["spread_all"] < 4 and bounds["listed"] == len(runs) - 1
    view = planned.outside_view()
    assert view["low"] < view["point"] < view["published"] < view["median"] < view["high"]
    assert view["published"] < planned.inside_view().low, "as K1 says"
    assert view["record_inside"] < 0.9 * view["n_tested"], "the correction missed its own target, as K1 says"


def test_links_are_distinct_and_of_their_form():
    urls = [source.url for source in registry.sources().values() if source.url]
    assert len(set(urls)) == len(urls) > 40
    form = r"https://arxiv\.org/abs/\d{4}\.\d{5}(v\d)?"
    assert [url for url in urls if "arxiv" in url and not re.fullmatch(form, url)] == []


def test_links_are_asked_where_there_is_a_network():
    """Without one the command says so, and that is no failure."""
    env = {"https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, ROOT / "tools" / "links.py", "--timeout", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "no network" in done.stdout
