"""The pages match the repository: links resolve, the walkthrough's lines hold what they name, both READMEs agree.

`python tests/test_docs.py` brings the walkthrough's line numbers up to date.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*", "docs/*", "examples/*", "claims/*", "diagnose/*", "vectors/*", ".github/*", "tests/data/golden/*")
PAGES = sorted(page for place in PLACES for page in ROOT.glob(f"{place}.md"))
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
STEP = re.compile(r"\[`([^`]+)`\]\((\.\./src/bessemer/[^#()]+)#L(\d+)\)")
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for _, target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {file.name} has no heading for #{anchor}"


def paragraphs(page: Path) -> list[str]:
    """Paragraphs and list entries, without tables, code and the targets of links."""
    blocks = re.split(r"\n\s*\n", re.sub(r"<!--.*?-->", "", prose(page), flags=re.S))
    parts = [part for block in blocks for part in re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", block)]
    return [LINK.sub(r"\1", part) for part in parts if not part.lstrip().startswith("|")]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")], ids=lambda page: page.name
)
def test_paragraphs_are_short(page):
    long = [part.split() for part in paragraphs(page) if len(part.split()) > 120]
    assert not long, "over 120 words: " + "; ".join(" ".join(part[:8]) for part in long)


def test_rl_on_your_model_takes_at_most_six_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/your-model.md").read_text("utf-8"), re.M | re.S)
    commands = [line for block in blocks for line in block.splitlines()]
    assert commands.index("bessemer run mine.toml") < 6


def test_recipes_in_the_pages_are_whole(tmp_path):
    """Those that a page shows as a file, `# NAME.toml`."""
    pages = [page for page in PAGES if page.suffix == ".md"]
    shown = re.compile(r"^```toml\n(# \w+\.toml.*?)^```", re.M | re.S)
    blocks = [block for page in pages for block in shown.findall(page.read_text("utf-8"))]
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block, encoding="utf-8")
        Recipe.load(path)


def test_the_readme_is_short_and_both_languages_say_the_same():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert len(english.splitlines()) <= 80 and len(english.split()) <= 900
    commands = [re.sub(r"\s*#.*", "", block) for block in re.findall(r"^```.*?^```", english, re.M | re.S)]
    assert commands == [re.sub(r"\s*#.*", "", block) for block in re.findall(r"^```.*?^```", chinese, re.M | re.S)]
    targets = [
        [target.replace(".zh.md", ".md") for _, target in LINK.findall(text) if not target.startswith("README")]
        for text in (english, chinese)
    ]
    assert targets[0] == targets[1]
    assert english.count("\n## ") == chinese.count("\n## ") and english.count("\n|") == chinese.count("\n|")


def test_the_site_s_pages_have_links_that_lead_somewhere(tmp_path):
    """The site's links are those of the files here, rewritten to where the targets are on the site."""
    command = [sys.executable, ROOT / ".ci" / "site_pages.py", tmp_path / "site"]
    subprocess.run(command, check=True, capture_output=True)
    pages = tmp_path / "site" / "docs"
    written = (pages / "walkthrough.md").read_text(encoding="utf-8")
    path, line = re.search(r"\[`Trainer\.update`\]\(([^()#]+)#__codelineno-0-(\d+)\)", written).groups()
    fence = (pages / path).read_text(encoding="utf-8").partition('linenums="1"\n')[2]
    assert "def update(" in fence.splitlines()[int(line) - 1]
    assert "](guide/gpus.md#gpus)" in (pages / "index.md").read_text(encoding="utf-8")
    assert '<a href="index.html">' in (pages / "claims.html").read_text(encoding="utf-8")
    assert "guide/gpus.md" in (tmp_path / "site" / "mkdocs.yml").read_text(encoding="utf-8")


def found_at(name: str, path: str) -> int:
    """The line where a file defines `name` (for `Class.method`, inside that class), or else first mentions it."""
    lines = (WALKTHROUGH.parent / path).resolve().read_text(encoding="utf-8").splitlines()
    owner, _, last = name.rpartition(".")
    start = next((number for number, line in enumerate(lines) if owner and re.match(rf"class {owner}\b", line)), 0)
    defined = re.compile(rf"^\s*(async def|def|class) {re.escape(last)}\b|^\s*{re.escape(last)}\b\s*[:=]")
    numbered = list(enumerate(lines, start=1))[start:]
    matches = [number for number, line in numbered if defined.match(line)]
    matches = matches or [number for number, line in numbered if last in line]
    assert matches, f"{path} does not hold {name}"
    return matches[0]


def test_the_walkthrough_leads_to_the_lines_it_names():
    text = WALKTHROUGH.read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    paths = [section for section in sections if STEP.search(section)]
    assert len(paths) == 4
    for section_text in paths:
        title, steps = section_text.splitlines()[0], STEP.findall(section_text)
        assert len(steps) >= 10, f"{title}: {len(steps)} links"
        for name, path, line in steps:
            lines = (WALKTHROUGH.parent / path).resolve().read_text(encoding="utf-8").splitlines()
            last = name.rpartition(".")[2]
            assert int(line) <= len(lines) and last in lines[int(line) - 1], (
                f"{title}: {path} line {line} does not hold {name}; run: python tests/test_docs.py"
            )


if __name__ == "__main__":
    text = WALKTHROUGH.read_text(encoding="utf-8")
    fresh = STEP.sub(lambda step: f"[`{step[1]}`]({step[2]}#L{found_at(step[1], step[2])})", text)
    WALKTHROUGH.write_text(fresh, encoding="utf-8")
    sys.stdout.write("the walkthrough is up to date\n" if fresh == text else "the walkthrough's lines were updated\n")
