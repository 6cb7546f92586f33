"""Asks every source of sources.toml for an answer: `python claims/tools/links.py`.

Exit status 1 names the links that are gone: those whose server answers 404 or 410. A server that refuses a program, or
does not answer, is listed and is no failure; without any network at all the command says so and ends with 0."""

from __future__ import annotations

import argparse
import sys
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "bessemer_claims" / "sources.toml"
GONE = (404, 410)


def ask(url: str, timeout: float) -> int | str:
    """The status of a link, or why there was no answer."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (links of a claims page)"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=20, help="seconds for each link")
    args = parser.parse_args()
    table = tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    urls = {key: row["url"] for key, row in table.items() if "url" in row}
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(urls, pool.map(lambda url: ask(url, args.timeout), urls.values()), strict=True))
    answered = {key for key, answer in answers.items() if isinstance(answer, int)}
    for key, url in urls.items():
        if answers[key] != 200:
            print(f"{key:<15} {answers[key]}  {url}")
    if not answered:
        print(f"no network: none of {len(urls)} links could be asked")
        return 0
    gone = [key for key, answer in answers.items() if answer in GONE]
    fine = sum(answer == 200 for answer in answers.values())
    print(f"{len(urls)} links: {fine} answer, {len(gone)} are gone, {len(urls) - fine - len(gone)} could not be judged")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
