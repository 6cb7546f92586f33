"""The entry point: from the trusted side into the process that runs the program.

    main.py MODE LEVEL ASK REPLY INFO ALIVE PARENT CPU MEMORY FILE PROCESSES [+PATH...] [-PATH...]

MODE is once, each or warm (see serve.py), with a + behind it if the program may use the names of serve.IMPORTED. ASK,
REPLY, INFO and ALIVE are file descriptors (see ../process.py), PARENT the trusted process, CPU seconds, MEMORY and FILE
bytes; if FILE is 0, nothing can be written. In mode warm ASK is a socket, over which bounds come with every program.
The program may read below each +PATH and not below a -PATH.
"""

import os
import sys

import confine
import serve


def main(
    mode: str, level: str, ask: int, reply: int, info: int, alive: int, parent: int, bounds: list[int], paths: list[str]
) -> None:
    isolated = level != "none"
    if level == "namespaces":
        readable, hidden = ([path[1:] for path in paths if path[0] == sign] for sign in "+-")
        confine.enter_namespaces(info, (ask, reply), parent, bounds[2], readable, hidden)
    elif level == "bubblewrap":
        confine.enter_bubblewrap(alive, bounds[2], mounts=mode.startswith("warm"))
    else:
        confine.report_pid(info, os.getpid())
    if isolated:
        confine.protect()
    sys.path.pop(0)  # this folder
    names = serve.names_of(mode.endswith("+"))  # before the program's time begins
    if mode.startswith("warm"):
        serve.serve_warm(ask, reply, names)
    if mode.startswith("each"):
        if not isolated:
            confine.die_with(parent)
        serve.serve_each(ask, reply, bounds, isolated, names)
        return
    if isolated:
        confine.fork_program((ask, reply))
    low, high = sorted((ask, reply))
    for first, end in ((3, low), (low + 1, high), (high + 1, 1024)):
        os.closerange(first, end)
    confine.limit(*bounds, parent=1 if isolated else parent, isolated=isolated)
    serve.serve(ask, reply, names)


mode, level, *numbers = sys.argv[1:12]
ask, reply, info, alive, parent, *bounds = map(int, numbers)
main(mode, level, ask, reply, info, alive, parent, bounds, sys.argv[12:])
