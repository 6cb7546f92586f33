"""Process 1 of the program's pid namespace: ours, so that it can neither be killed nor spoken for from inside.

When it exits, the kernel ends whatever is left in the namespace, and only then is it itself gone.
"""

import os

from libc import PR_SET_DUMPABLE, call


def fork_program(pipes: tuple[int, int]) -> None:
    """Return in a child; the caller stays, out of the reach of ptrace, and exits as that child does."""
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    pid = os.fork()
    if pid:
        leave_as(pid, pipes)


def leave_as(pid: int, pipes: tuple[int, int]) -> None:
    """Let go of the pipes and exit as child `pid` does (128 + n after signal n), reaping whatever else ends before."""
    for fd in pipes:
        os.close(fd)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
