"""Calls into the C library that Python does not offer, and what the launchers share.

Errors are OSError with the name of the call.
"""

import ctypes
import os
import signal

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def call(name: str, *args: object) -> int:
    """Integers go as C longs: the variadic functions among these (prctl, syscall) read nothing narrower."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with(parent: int) -> None:
    """Be killed when the parent dies; any later change of user or capabilities undoes it."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def tell(info: int, pid: int) -> None:
    """The process whose death ends the program, in the form of bubblewrap's --info-fd."""
    os.write(info, b'{"child-pid": %d}\n' % pid)
    os.close(info)
