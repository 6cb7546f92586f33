"""Keeps committed results after a rename: the digests of settings follow keys that only changed their names.

    python claims/tools/renamed.py --before digests.json    in the state before the rename
    python claims/tools/renamed.py --after digests.json     after it: rewrites the digests in the committed results

The digest of an arm covers the text of its settings, so that results of other settings are never mixed in. A key with
a new name, and an option that moved to another module, changes the text and not the run. Only then is this right: show
by the bits of a run (bench/same_run.py) that it is.
"""

import argparse
import json
from pathlib import Path

from bessemer_claims import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="FILE", help="write today's digests to FILE")
    parser.add_argument("--after", type=Path, metavar="FILE", help="replace the digests in FILE by today's")
    args = parser.parse_args()
    today = {"/".join(key): digest for key, digest in results.digests().items()}
    if args.before is not None:
        args.before.write_text(json.dumps(today, indent=1), encoding="utf-8")
    if args.after is None:
        return
    earlier = json.loads(args.after.read_text(encoding="utf-8"))
    changed = {earlier[arm]: digest for arm, digest in today.items() if arm in earlier and earlier[arm] != digest}
    for path in sorted(results.COMMITTED.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        for old, new in changed.items():
            text = text.replace(f'"settings": "{old}"', f'"settings": "{new}"')
        path.write_text(text, encoding="utf-8")
    print(f"{len(changed)} settings have a new digest")


if __name__ == "__main__":
    main()
