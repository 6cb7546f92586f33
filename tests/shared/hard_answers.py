"""A task whose answers say what happens to the process that judges them."""

import os
import signal
import time

from bessemer.addons.tasks.verifiers import CostlyTask
from bessemer.errors import UserError
from bessemer.tasks.base import Problem, Verdict


class Hard(CostlyTask):
    name, domain = "hard", "words"

    def make(self, split, index, seed, language, phrasing):
        return Problem(f"hard/{index}", "?", language)

    def verify(self, problem, completion):
        kind, _, number = completion.partition(" ")
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "once":  # the file is there from the second time on
            try:
                os.close(os.open(number, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return Verdict(True, True, "correct", "again")
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(1000)
        if kind == "memory":
            bytearray(1 << 50)
        if kind == "crash":
            raise RecursionError("what a parser may raise")
        if kind == "mend":
            raise UserError("mend this first")
        return Verdict(kind == "right", True, "correct" if kind == "right" else "wrong-value", str(os.getpid()))
