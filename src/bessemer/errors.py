"""The one exception for mistakes a user can fix.

Raise it with a message that says what is wrong, where, and how to fix it. The command line prints it as a single line
and exits with status 2; any other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in a recipe, an argument, a file or the environment that the user can fix."""
