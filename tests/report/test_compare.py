"""Several runs in one report."""

import json
import re

import fake_run
import pytest
from browser import chromium, violations
from chinese_pages import untranslated
from test_card import Page

from bessemer.addons.watch import compare
from bessemer.cli import main
from bessemer.errors import UserError


def words(html):
    return " ".join(" ".join(Page(html).text).split())


def section(text, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, one with another seed that learnt less, and one without RL."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "less", "bare"):
        fake_run.make(folder / name)
    recipe = (folder / "less" / "recipe.toml").read_text()
    (folder / "less" / "recipe.toml").write_text(
        recipe.replace("seed = 7", "seed = 8").replace("8000000", "9000000")
        + '[[stage]]\nkind = "eval"\nname = "more"\n'
    )
    for name in ("03-before", "05-after"):
        path = folder / "less" / name / "results.json"
        rows = json.loads(path.read_text())
        halves = [{name: share / 2 for name, share in row["by_problem"].items()} for row in rows]
        half = [
            row | {"pass_at_1": row["pass_at_1"] / 2, "by_problem": by} for row, by in zip(rows, halves, strict=True)
        ]
        path.write_text(json.dumps(half))
    lines = (folder / "bare" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "bare" / "metrics.jsonl").write_text("".join(line for line in lines if '"zero"' not in line))
    return folder


def test_runs_side_by_side(runs):
    """Each figure is in its run's column, and each curve has a line for every run that recorded it."""
    text = compare.write([runs / "one", runs / "less"]).read_text("utf-8")
    kept = "one less corpus pretrain before zero after rl eval more countdown chinese code drills fables"
    assert untranslated(text, kept, "seed pretrain.tokens") == []
    results = section(text, "results")
    heads = re.findall(r'<th scope="col">([^<]+)<small>', results)
    assert heads[:4] == ["one · pretrain", "less · pretrain", "one · zero", "less · zero"]
    assert "18.1" in words(results) and "9.0" in words(results) and "<b>56.9</b>" in results and "28.4" in results
    better = words(section(text, "differences"))
    assert "Which is better" in better and "the first is better" in better and "the second is better" not in better
    rows = [words(row) for row in re.findall(r"<tr>.*?</tr>", section(text, "settings"))]
    assert rows == ["key one less", "seed 7 8", "pretrain.tokens 8000000 9000000", "stage more – eval"]
    curves = section(text, "curves")
    for chart in re.findall(r"<figure.*?</figure>", curves, re.DOTALL):
        assert re.search(r"<b>one</b>.*<b>less</b>", chart, re.DOTALL) and chart.count("data-line=") in (2, 4)
    assert re.findall(r"<h3>(\w+)", curves) == ["pretrain", "zero"] and "bits per byte, code" in words(curves)
    assert "over tokens" in curves and "over steps" in curves
    assert re.search(r"zero 4\.8 4\.8 .* all 12\.8 12\.8", words(section(text, "cost")))
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 10


def test_parts_missing_from_one_run_are_left_out(runs):
    text = compare.render({name: compare.read(runs / name) for name in ("one", "less", "bare")})
    loss = next(c for c in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if "next token" in c)
    accuracy = next(c for c in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if "correct in training" in c)
    assert "<b>bare</b>" in loss and "<b>bare</b>" not in accuracy and "<b>less</b>" in accuracy
    html = compare.render({name: compare.read(runs / name) for name in ("one", "bare")})
    assert (
        untranslated(html, "one bare corpus pretrain before zero after rl countdown chinese code drills fables") == []
    )
    assert "no significant difference" in section(html, "differences")
    assert 'id="settings"' not in html and "Nothing to compare for: what" in words(html)


def test_the_command_writes_one_file_and_leaves_the_reports_alone(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bessemer", "report", str(runs / "one"), str(runs / "bare")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out.strip() == str(runs / "one-and-bare.html")
    assert not (runs / "one" / "report.html").exists()
    with pytest.raises(UserError, match="named twice"):
        compare.write([runs / "one", runs / "one" / ".." / "one"])


def test_runs_of_the_same_name_are_distinguished_and_hostile_names_stay_text(tmp_path):
    for folder in ("a", "b"):
        run = fake_run.make(tmp_path / folder / "<u>run")
        (run / "recipe.toml").write_text(f'name = "x"\nsystem = "<script>{folder}</script>"\n')
    path = compare.write([tmp_path / folder / "<u>run" for folder in "ab"])
    text = path.read_text("utf-8")
    page = Page(text)
    assert path.parent == tmp_path / "a" and "/" not in path.name and page.tags.count("script") == 1
    assert "u" not in page.tags and "a/<u>run" in words(text) and "<script>b</script>" in words(text)


def test_axe_finds_nothing(runs):
    path = compare.write([runs / "one", runs / "less"])
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        page.goto(f"file://{path}")
        page.locator("figure").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").first.is_visible() and violations(page) == []
