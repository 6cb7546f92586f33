"""Real processes without the two seconds that starting Python and importing torch take: forks of the test process.

For tests of what a process leaves behind when it is killed or stopped. Tests of how a program starts must start it, and
so must whole runs with libraries that keep threads (tokenizers, Ray, inductor): one such fork waited forever.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable


class Fork(subprocess.Popen):
    """work() in a fork that leads its own session; the return value is the exit status. stdout and stderr are pipes of
    text, and the rest is as in Popen."""

    def __init__(self, work: Callable[[], int | None]) -> None:
        self._work = work
        super().__init__(["fork"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _execute_child(self, *arguments) -> None:
        # c2pwrite and errwrite, in every Python from 3.11
        out, err = arguments[13], arguments[15]
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
