"""The command line: one command per user task.

Nothing heavy is imported before a command has its arguments, so `bessemer --help` is instant. Results go to standard
output (as JSON with --json), everything else to standard error. Exit status: 0 done, 2 an error that the user can fix
(`error: ...`), 130 stopped by a signal with everything saved.
"""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bessemer import __version__
from bessemer.cli.common import app, one_line
from bessemer.errors import UserError
from bessemer.system import prepare_cuda, unsupported

from bessemer.cli import runs  # noqa: F401  isort: skip  # registers its command


_USAGE: type[Exception] = typer.BadParameter.__mro__[2]
"""The usage error of typer's bundled parser, which has no other public name."""


def main() -> None:
    """The program `bessemer`."""
    prepare_cuda()
    previous, warnings.showwarning = warnings.showwarning, _warn
    try:
        status = app(prog_name="bessemer", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        _end(error)
    except typer.Abort:  # Ctrl-C
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except _USAGE as error:
        _misused(error)
    except OSError as error:
        from bessemer.runs.files import explain

        if (refusal := explain(error, Path("."))) is None:
            raise
        _end(refusal)
    finally:
        warnings.showwarning = previous


def _misused(error: Any) -> NoReturn:
    """Reports a wrong or missing option or argument in one line; shows a group's help if its command is missing."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "bessemer"
    _end(f"{error.format_message().rstrip('.')}; see {command} --help")


def _end(error: object) -> NoReturn:
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Prints a warning on one line, without its place in the source."""
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
    if (why := unsupported()) and "--help" not in sys.argv:
        raise UserError(why)
