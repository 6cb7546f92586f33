"""The start: from the trusted side into the process that runs the program.

main.py LEVEL ASK REPLY INFO PARENT CPU MEMORY FILE PROCESSES [+PATH...] [-PATH...]

ASK, REPLY and INFO are file descriptors (see ../process.py), PARENT the trusted process, CPU seconds, MEMORY and FILE
bytes; the program may read below each +PATH and not below a -PATH.
"""

import os
import sys

import confine
import serve


def main(level: str, ask: int, reply: int, info: int, parent: int, bounds: list[int], paths: list[str]) -> None:
    if level == "namespaces":
        readable, hidden = ([path[1:] for path in paths if path[0] == sign] for sign in "+-")
        confine.enter_namespaces(info, (ask, reply), parent, readable, hidden)
    elif level == "bubblewrap":
        confine.fork_program((ask, reply))
    else:
        confine.report_pid(info, os.getpid())
    low, high = sorted((ask, reply))
    for first, end in ((3, low), (low + 1, high), (high + 1, 1024)):
        os.closerange(first, end)
    sys.path.pop(0)  # this folder
    confine.limit(*bounds, parent=parent if level == "none" else 1, isolated=level != "none")
    serve.serve(ask, reply)


level, *numbers = sys.argv[1:10]
ask, reply, info, parent, *bounds = map(int, numbers)
main(level, ask, reply, info, parent, bounds, sys.argv[10:])
