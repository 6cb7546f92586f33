"""`python -m bessemer` is the `bessemer` command."""

import sys

from bessemer.cli import main

sys.exit(main())
