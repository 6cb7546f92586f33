"""Malicious contest programs: what each tries, the program, and its verdict on "print the sum of two numbers"."""
# ruff: noqa: E501

RIGHT = "print(sum(map(int, input().split())))"

HOSTILE = {
    # exhaust resources
    "read for ever": ("import sys\nwhile True: sys.stdin.read()", "timeout"),
    "wait for more input": ("import time\nprint(7)\ntime.sleep(99)", "timeout"),
    "read past the end": ("while True: a = input()", "error"),
    "print without end": ("while True: print(7)", "output"),
    "one line without end": ("import os\nwhile True: os.write(1, b'7' * 9999)", "output"),
    "errors without end": ("import os\nwhile True: os.write(2, b'7' * 9999)", "output"),
    "memory": ("print('7' * 10**10)", "memory"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "stop": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    # exit early
    "exit with 0": ("raise SystemExit(0)", "wrong-output"),
    "os._exit(0)": ("import os\nos._exit(0)", "wrong-output"),
    "right, then exit with 1": (RIGHT + "\nraise SystemExit(1)", "error"),
    "right, then killed": (f"import os, sys\n{RIGHT}\nsys.stdout.flush()\nos.kill(os.getpid(), 9)", "error"),
    "does not compile": ("print(7", "syntax-error"),
    "does not compile, later": ("if True:\nprint(7)", "syntax-error"),
    # print what was not computed
    "nothing": ("", "wrong-output"),
    "the output of the first test": ("print(7)", "wrong-output"),
    "all the outputs": ("print(7, 30, 2)", "wrong-output"),
    "all the outputs, a line each": ("print(7)\nprint(30)\nprint(2)", "wrong-output"),
    "verdict": ("print('correct')\nprint('{\"status\": 0}')", "wrong-output"),
    "status on every pipe": ("import os\nfor fd in range(3, 99):\n    try: os.write(fd, b'{\"status\": 0}\\n' * 9)\n    except OSError: pass", "wrong-output"),
    "right, then more": (RIGHT + "\nprint(7)", "wrong-output"),
    "right on standard error": ("import sys\nprint(sum(map(int, input().split())), file=sys.stderr)", "wrong-output"),
    "erase": ("print('7', end='\\b\\b\\r7\\n')", "wrong-output"),
    "two that print": (f"import os\npid = os.fork()\n{RIGHT} if pid == 0 else os.waitpid(pid, 0) and print(7)", "wrong-output"),
    # read the expected output
    "frames": ("import sys\nframe = sys._getframe()\nwhile frame:\n    for v in (*frame.f_locals.values(), *frame.f_globals.values()):\n        if isinstance(v, (str, bytes)) and b'30' in (v if isinstance(v, bytes) else v.encode()): print(30)\n    frame = frame.f_back\nprint('x')", "wrong-output"),
    "all objects": ("import gc\nprint([o for o in gc.get_objects() if isinstance(o, (list, tuple)) and any('30' == x for x in o if type(x) is str)])", "wrong-output"),
    "every file descriptor": ("import os\nfor fd in range(3, 99):\n    try: print(os.read(fd, 999))\n    except OSError: pass", "wrong-output"),
    "input again": ("import os\nos.lseek(0, 0, 0)\nprint(os.read(0, 999).decode())", "wrong-output"),
    "tests on disk": ("import glob, os\nprint([open(p).read() for p in glob.glob('/tmp/**', recursive=True) + glob.glob('/*') if os.path.isfile(p)])", "wrong-output"),
    # tamper with the judge's environment
    "print": ("import builtins\nbuiltins.print = lambda *a: None\nprint(7)", "wrong-output"),
    "exit hook": ("import atexit\natexit.register(print, 7)", "wrong-output"),
    "the server": ("import sys\nfor m in list(sys.modules.values()):\n    for name in ('_send', '_relay', '_write', 'end_program'):\n        if hasattr(m, name): setattr(m, name, lambda *a: 0)\nprint(7)", "wrong-output"),
    "kill everyone": ("import os\nos.kill(-1, 9)", "error"),
    "kill the first": ("import os, signal\nfor n in range(1, 32):\n    try: os.kill(1, n)\n    except OSError: pass\nprint(7)", "wrong-output"),
    "close everything": ("import os\nos.closerange(0, 99)", "wrong-output"),
}  # fmt: skip

# Ways of passing something to the next test: code that leaves it, and an expression that finds it.
CHANNELS = {
    "a file": ("open('/tmp/file', 'x')", "os.path.exists('/tmp/file')"),
    "a file beside the program": ("open('seen', 'x')", "os.path.exists('seen')"),
    "a folder": ("os.mkdir('/tmp/folder')", "os.path.exists('/tmp/folder')"),
    "a link": ("os.symlink('/', '/tmp/link')", "os.path.islink('/tmp/link')"),
    "shared memory on disk": ("open('/dev/shm/seen', 'x')", "os.path.exists('/dev/shm/seen')"),
    "a module": ("sys.seen = 1", "hasattr(sys, 'seen')"),
    "a builtin": ("builtins.seen = 1", "hasattr(builtins, 'seen')"),
    "the environment": ("os.environ['SEEN'] = '1'", "'SEEN' in os.environ"),
    "the folder it is in": ("os.chdir('/')", "os.getcwd() == '/'"),
    "flags of the output": ("fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)", "fcntl.fcntl(1, fcntl.F_GETFL) & os.O_NONBLOCK"),
    "size of the output's pipe": ("fcntl.fcntl(1, 1031, 4096)", "fcntl.fcntl(1, 1032) == 4096"),
    "the input": ("os.write(0, b'seen')", "os.fstat(0).st_size > 9"),
    "limits": ("resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 9"),
    "priority": ("os.nice(19)", "os.nice(0) == 19"),
    "a process": ("time.sleep(0) if os.fork() else [os.setsid(), time.sleep(60)]", "alive()"),
    "a process of a process": ("time.sleep(0) if os.fork() else [os.setsid(), os.fork() or time.sleep(60)]", "alive()"),
}  # fmt: skip
ALIVE = """
import builtins, fcntl, os, resource, sys, time
def alive():
    def there(pid):
        try: os.kill(pid, 0)
        except ProcessLookupError: return False
        except PermissionError: return True
        return True
    return any(there(pid) for pid in range(2, 400) if pid != os.getpid())
"""


def passing(names) -> str:
    """A program that prints the name of every channel in which it finds something, or else the right answer."""
    looks = "\n".join(f"if {CHANNELS[name][1]}: found.append({name!r})" for name in names)
    leaves = "\n".join(f"try: {CHANNELS[name][0]}\nexcept OSError: pass" for name in names)
    answer = f"if found: print(*found)\nelse: {RIGHT}\nsys.stdout.flush()"
    return f"{ALIVE}\nfound = []\n{looks}\n{answer}\n{leaves}\n"
