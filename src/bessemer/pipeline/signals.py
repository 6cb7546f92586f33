"""SIGINT and SIGTERM: the first lets a stage save and stop, the second kills."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bessemer.runs.context import StopFlag


@contextmanager
def signals(together: bool = False, quiet: bool = False) -> Iterator[StopFlag]:
    """The first SIGINT or SIGTERM raises the flag, the second does what it always did. To ranks that were started
    `together` Ctrl-C may come twice, from the terminal and from who started them: within a second it counts as one."""
    stop, first = StopFlag(), 0.0

    def on_signal(number: int, _: Any) -> None:
        nonlocal first
        if stop and not (together and time.monotonic() - first < 1.0):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if stop:
            return
        stop.signal, first = number, time.monotonic()
        if not quiet:  # os.write, since a signal may arrive in the middle of a print
            os.write(2, b"\nstopping: saving a checkpoint first (once more to stop at once)\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
