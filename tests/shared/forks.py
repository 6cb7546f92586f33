"""Real processes that need not start Python and import torch first, two seconds each: forks of the tests' own.

For tests of what a process leaves when it is killed or stopped; how a program starts is for those that start it, and
whole runs with libraries that keep threads (tokenizers, Ray, inductor) are, too: one such fork waited forever.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable


class Fork(subprocess.Popen):
    """work() in a fork, which leads a session of its own; its result is the exit status. With pipes of text for what it
    says, and all else that Popen has."""

    def __init__(self, work: Callable[[], int | None]) -> None:
        self._work = work
        super().__init__(["fork"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _execute_child(self, *given) -> None:
        # c2pwrite and errwrite, in every Python from 3.11 on
        out, err = given[13], given[15]
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setsid()
                os.dup2(out, 1), os.dup2(err, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = self._work() or 0
            except SystemExit as done:
                status = done.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        self._child_created = True
        os.close(out), os.close(err)
