"""python -m bessemer_vectors, and the command bessemer-vectors."""

import sys

from bessemer_vectors.cli import main


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
