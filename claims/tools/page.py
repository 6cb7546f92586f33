"""Writes docs/claims.html and docs/claims-rules.md, and their counts in both READMEs, from the committed results.

    python claims/tools/page.py [--runs runs/claims]

With --runs, the finished runs in that folder are first added to the committed results. A test fails when this is due.
"""

import argparse
import datetime
import re
import sys
from pathlib import Path

from bessemer_claims import both_rules, page, results

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "claims.html"
RULES = ROOT / "docs" / "claims-rules.md"
READMES = (ROOT / "README.md", ROOT / "README.zh.md")


def main(runs: Path | None) -> None:
    if runs is not None:
        arm_results = results.finished(runs)
        for sentence in arm_results.left_out:
            print(sentence, file=sys.stderr)
        if not arm_results.results:
            sys.exit(f"no finished runs in {runs}; its folders hold result.json")
        results.save(arm_results.results, results.COMMITTED)
    card_list = page.committed()
    PAGE.write_text(page.document(card_list, datetime.date.today()), encoding="utf-8")
    RULES.write_text(both_rules.compared(card_list), encoding="utf-8")
    for readme, tally in zip(READMES, page.tallies(card_list), strict=True):
        form = re.sub(r"\d+", r"\\d+", re.escape(tally))
        text, changed = re.subn(form, tally, readme.read_text(encoding="utf-8"))
        assert changed == 1, f"{readme.name} has no sentence like: {tally}"
        readme.write_text(text, encoding="utf-8")
        print(tally)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="finished runs to join to the committed results first")
    main(parser.parse_args().runs)
