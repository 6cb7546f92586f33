"""The command line: one command per task of a user.

Nothing heavy is imported before a command has its arguments, so `bessemer --help` is instant. Figures go to standard
output (as JSON with --json), everything else to standard error. Exit status: 0 done, 2 an error that the user can fix
(`error: ...`), 130 stopped by a signal with everything saved.
"""

import sys
import warnings
from typing import Annotated

import typer

from bessemer import __version__
from bessemer.cli.common import app, one_line
from bessemer.errors import UserError

# Each registers its commands, in the order in which --help shows them.
from bessemer.cli import runs  # noqa: F401  isort: skip
from bessemer.cli import talk  # noqa: F401  isort: skip
from bessemer.cli import models  # noqa: F401  isort: skip
from bessemer.cli import plan  # noqa: F401  isort: skip
from bessemer.cli import data  # noqa: F401  isort: skip


def main() -> None:
    """The program `bessemer`."""
    before, warnings.showwarning = warnings.showwarning, _warn
    try:
        app()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        warnings.showwarning = before


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Prints a warning on one line, without the place in the source."""
    name = "warning" if category is UserWarning else category.__name__
    print(f"{name}: {one_line(message)}", file=sys.stderr)


def _version(requested: bool) -> None:
    if requested:
        print(f"bessemer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass
