"""`python -m bessemer` is the `bessemer` command."""

from bessemer.cli import main

main()
