"""Makes the pages of the documentation site from files of the repository: python .ci/site_pages.py DIR
Once it is built, python .ci/site_pages.py --languages DIR marks its Chinese pages.

The READMEs are its start pages. Every section of docs/guide.md is a page. Recipes, examples and source files that a
page links to become pages with numbered lines; notebooks become pages with their outputs; every room has a page of its
docstrings. Links that work in the repository are rewritten to the page of their target; a dead link is an error.
The page of the claims, which stands alone in the repository, gets a link back to the start.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
import tomllib
from pathlib import Path

from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "src" / "bessemer", *(ROOT / name / "src" / f"bessemer_{name}" for name in ("claims", "vectors")))
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".sh": "bash",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".cpp": "cpp",
    ".hpp": "cpp",
}
slug = slugify(case="lower")


class Site:
    """Maps files of the repository to pages of the site."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {"README.md": "index.md", "README.zh.md": "zh.md"}
        """File of the repository: page of the site."""
        self.texts: dict[str, str] = {}
        """Page: its text, unless mkdocs reads it from docs."""
        self.origins: dict[str, str] = {}
        """Page: the file that its links start from."""
        self.sections: dict[str, str] = {}
        """Heading of the guide: its page."""
        self.lost: set[str] = set()
        for path in ("README.md", "README.zh.md"):
            self.add(self.pages[path], (ROOT / path).read_text("utf-8"), path)
        for path in sorted(ROOT.glob("docs/*")):
            if path.suffix in (".md", ".html", ".svg", ".png") and path.name != "guide.md":
                self.pages[f"docs/{path.name}"] = path.name
                self.origins[path.name] = f"docs/{path.name}"
        self.add_guide()
        self.add_notebooks()
        self.add_recipes()
        self.add_api()
        for page, origin in list(self.origins.items()):
            text = self.texts.get(page) or ((ROOT / origin).read_text("utf-8") if page.endswith(".md") else "")
            for _, target, _ in LINK.findall(FENCE.sub("", text)):
                self.add_source(self.path_of(target, origin))

    def add(self, page: str, text: str, origin: str) -> None:
        self.texts[page], self.origins[page] = text, origin

    def add_guide(self) -> None:
        """Each `##` section of the guide as a page, its headings one level up."""
        self.add("guide/index.md", "", "docs/guide.md")
        first, *parts = re.split(r"^## ", (ROOT / "docs/guide.md").read_text("utf-8"), flags=re.M)
        listed = ""
        for part in parts:
            title, _, body = part.partition("\n")
            page = f"guide/{slug(title, '-')}.md"
            text = f"# {title}\n" + re.sub(r"^#(##+ )", r"\1", body, flags=re.M)
            self.add(page, text, "docs/guide.md")
            for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
                self.sections[slug(heading, "-")] = page
            listed += f"- [{title}](guide.md#{slug(title, '-')})\n"
        self.add("guide/index.md", f"{first}\n{listed}", "docs/guide.md")
        self.pages["docs/guide.md"] = "guide/index.md"

    def add_notebooks(self) -> None:
        listed = "# Notebooks\n\nThree things by hand, small enough to see every number. The tests run them.\n\n"
        for path in sorted((ROOT / "examples/notebooks").glob("*.ipynb")):
            text = notebook(path)
            page = f"notebooks/{path.stem}.md"
            self.pages[f"examples/notebooks/{path.name}"] = page
            self.add(page, text, f"examples/notebooks/{path.name}")
            title = text.partition("\n")[0].removeprefix("# ")
            listed += f"- [{title}]({path.name})\n"
        self.add("notebooks/index.md", listed, "examples/notebooks/README")

    def add_recipes(self) -> None:
        """The list of recipes, each with its opening comment, and the table of keys."""
        from bessemer.addons.plan.recipe_help import describe_keys
        from bessemer.model.config import PRESETS, ModelConfig

        listed = (
            "# Recipes\n\n`bessemer run NAME` runs one. What each needs (machine, memory, minutes) and gives is in\n"
            "[a table](../docs/models.md#recipes-and-hardware); [every key](../docs/keys.md) has a help text.\n\n"
        )
        for path in sorted((ROOT / "recipes").glob("*.toml")):
            text = path.read_text("utf-8")
            comment = " ".join(line.lstrip("# ") for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
            listed += f"**[{path.stem}]({path.name})**\n: {comment}\n\n"
        self.add("recipes.md", listed.replace("\n: ", "  \n"), "recipes/README")
        tables = re.split(r"\n\n(?=\S)", describe_keys(None, ModelConfig, list(PRESETS)))
        keys = "".join(
            f"## {table.partition(chr(10))[0]}\n\n```text\n{table.partition(chr(10))[2]}\n```\n\n" for table in tables
        )
        self.add("keys.md", f"# Keys of a recipe\n\nAs `bessemer keys` prints them.\n\n{keys}", "docs/keys.md")
        self.pages["docs/keys.md"] = "keys.md"

    def add_api(self) -> None:
        """A page per room and one per project beside the package: the docstrings of their modules, by name."""
        listed = "# API\n\nThe rooms of the package, as [architecture](../docs/architecture.md) explains them.\n\n"
        core, *others = PACKAGES
        rooms = [(path, core.parent) for path in core.iterdir() if (path / "__init__.py").exists()]
        for room, folder in [*sorted(rooms), *((path, path.parent) for path in others)]:
            modules = sorted(
                ".".join(path.relative_to(folder).with_suffix("").parts) for path in room.rglob("*.py")
                if path.name not in ("__init__.py", "__main__.py")
            )  # fmt: skip
            if not modules:
                continue
            name = ".".join(room.relative_to(folder).parts)
            text = f"# {name}\n\n" + "".join(f"::: {module}\n\n" for module in modules)
            self.add(f"api/{room.name}.md", text, "docs/api.md")
            self.pages[f"api/{room.name}"] = f"api/{room.name}.md"
            listed += f"- [{room.name}](../api/{room.name})\n"
        self.add("api/index.md", listed, "docs/api.md")

    def add_source(self, path: str) -> None:
        """A file of the repository as a page with numbered lines."""
        file = ROOT / path
        if path in self.pages or not file.is_file():
            return
        page = f"source/{path}.md"
        self.pages[path] = page
        if file.suffix == ".md":
            self.add(page, file.read_text("utf-8"), path)
        else:
            language = LANGUAGES.get(file.suffix, "text")
            text = f'# {path}\n\n``````{language} linenums="1"\n{file.read_text("utf-8")}\n``````\n'
            self.add(page, f"---\nsearch:\n  exclude: true\n---\n\n{text}", "")

    @staticmethod
    def path_of(target: str, origin: str) -> str:
        return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))

    def moved(self, target: str, page: str) -> str:
        """A page's link, rewritten to lead to the same target on the site."""
        origin = self.origins[page]
        if "://" in target or target.startswith("mailto:"):
            return target
        path, _, anchor = target.partition("#")
        repository = self.path_of(path, origin) if path else origin
        if repository == "docs/guide.md" and anchor:
            there = self.sections.get(anchor, "guide/index.md")
        elif not path:
            return target
        else:
            there = self.pages.get(repository, "")
        if not there:
            self.lost.add(f"{origin}: {target}")
            return target
        if there.startswith("source/") and (line := re.fullmatch(r"L(\d+)", anchor)):
            anchor = f"__codelineno-0-{line[1]}"
        relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return relative + (f"#{anchor}" if anchor else "")


def notebook(path: Path) -> str:
    """Its cells and their outputs as Markdown."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/plain") or [])
            picture = "".join(data.get("image/svg+xml") or data.get("text/html") or [])
            parts.append(picture.strip() if picture else f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def rewritten(site: Site, page: str, text: str) -> str:
    """A page's text with its links rewritten for the site; code blocks are left alone."""
    place, parts = 0, []
    for fence in [*FENCE.finditer(text), None]:
        end = fence.start() if fence else len(text)
        parts.append(LINK.sub(lambda found: found[1] + site.moved(found[2], page) + found[3], text[place:end]))
        if fence:
            parts.append(fence[0])
            place = fence.end()
    return "".join(parts)


def write(out: Path) -> None:
    """Writes the pages below out/docs, and out/mkdocs.yml with its navigation folders expanded to their pages."""
    site = Site()
    shutil.rmtree(out, ignore_errors=True)
    for page, origin in site.origins.items():
        file = out / "docs" / page
        file.parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".html"):
            back = '<p style="margin: 12px 20px 0"><a href="index.html">← Bessemer</a></p>'
            file.write_text((ROOT / origin).read_text("utf-8").replace("<body>", f"<body>\n{back}", 1), "utf-8")
            continue
        if page not in site.texts and not page.endswith(".md"):
            shutil.copyfile(ROOT / origin, file)
            continue
        text = site.texts.get(page) or (ROOT / origin).read_text("utf-8")
        file.write_text(rewritten(site, page, text) if origin else text, "utf-8")
    if site.lost:
        raise SystemExit("links that lead nowhere:\n" + "\n".join(sorted(site.lost)))
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    config = config.replace("paths: [src]", f"paths: [{', '.join(str(path.parent) for path in PACKAGES)}]")

    def listed(found: re.Match[str]) -> str:
        pages = [page for page in site.texts if page.startswith(found[3])]
        return f"{found[1]}{found[2]}:\n" + "".join(f"{' ' * len(found[1])}    - {page}\n" for page in pages)

    config = re.sub(r"^( *)(- \w+): (\w+/)\n", listed, config, flags=re.M)
    (out / "mkdocs.yml").write_text(config + published(), "utf-8")


def published() -> str:
    """What only a site with an address has: the repository, the address of its newest version, and the list of
    versions, which .ci/pages.py writes beside them."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    if "Documentation" not in urls:
        return ""
    site = urls["Documentation"].rstrip("/")
    return f"site_url: {site}/latest/\nrepo_url: {urls['Repository']}\nextra:\n  version:\n    provider: mike\n"


def mark_chinese(built: Path) -> None:
    """Says of the Chinese pages of the built site that they are Chinese, for screen readers, fonts and search."""
    for page in (built / "zh.html", *built.rglob("*.zh.html")):
        text = page.read_text("utf-8")
        marked = text.replace('<html lang="en"', '<html lang="zh-CN"', 1)
        if marked == text:
            raise SystemExit(f"{page} has no language to change")
        page.write_text(marked, "utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--languages":
        mark_chinese(Path(sys.argv[2]))
    else:
        write(Path(sys.argv[1]))
