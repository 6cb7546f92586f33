"""Malicious programs, grouped by what they try. Long lines are one-line programs."""
# ruff: noqa: E501

import os
from pathlib import Path

from bessemer.addons.tasks import sandbox

# Expressions that must raise inside the sandbox; {name} stands for the number of a system call.
PROBES = {
    "the password file": "open('/etc/passwd').read()",
    "the shadow file": "open('/etc/shadow').read()",
    "root's home": "os.listdir('/root')",
    "homes": "os.listdir('/home')",
    "this file": f"open({__file__!r}).read()",
    "the repository": f"os.listdir({str(Path(__file__).parents[2])!r})",
    "the sandbox's own source by its path": f"open({sandbox.__file__!r}).read()",
    "the host's processes": "os.listdir('/proc')",
    "the parent's environment": f"open('/proc/{os.getpid()}/environ').read()",
    "its own environment by file": "open('/proc/self/environ').read()",
    "the host's devices": "os.listdir('/sys')",
    "kernel memory": "open('/dev/mem', 'rb').read(1)",
    "a disk": "open('/dev/vda', 'rb').read(1)",
    "installed packages": "__import__('numpy')",
    "this package": "__import__('bessemer')",
    "the folder of installed packages": "os.listdir(os.path.join(os.path.dirname(os.__file__), 'site-packages'))",
    "a shell": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "a file in the root": "open('/x', 'w')",
    "a file in the library": "open(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w')",
    "a change of the library": "open(os.__file__, 'a')",
    "another interpreter": "open(sys.executable, 'r+b')",
    "rights on the root": "os.chmod('/', 0o777)",
    "a link out of it": "open(os.symlink('/etc/shadow', '/tmp/link') or '/tmp/link').read()",
    "a device": "os.mknod('/tmp/disk', 0o60660, os.makedev(254, 0))",
    "an internet socket": "socket.socket(socket.AF_INET)",
    "a socket of version 6": "socket.socket(socket.AF_INET6)",
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a socket to the hypervisor": "socket.socket(40, socket.SOCK_STREAM)",
    "a raw socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a connection": "socket.create_connection(('127.0.0.1', 22), 1)",
    "a name": "socket.getaddrinfo('example.com', 80)",
    "memory no limit counts": "os.memfd_create('x')",
    "being root": "os.setuid(0)",
    "root's group": "os.setgid(0)",
    "another root": "os.chroot('/tmp')",
    "niceness": "os.nice(-5)",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))",
    "the host's name": "socket.sethostname('x')",
    "new namespaces": "libc('unshare', 0x10000000)",
    "a new network": "libc('unshare', 0x40000000)",
    "a mount": "libc('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "taking the root's mount away": "libc('umount2', b'/', 2)",
    "tracing process 1": "libc('ptrace', 16, 1, 0, 0)",
    "being traced": "libc('ptrace', 0, 0, 0, 0)",
    "reading another's memory": "libc('process_vm_readv', 1, None, 0, None, 0, 0)",
    "keys": "libc('syscall', {keyctl}, 0, -3, 0)",
    "bpf": "libc('syscall', {bpf}, 0, None, 0)",
    "a ring": "libc('syscall', 425, 8, ctypes.create_string_buffer(256))",
    "shared memory": "libc('shmget', 0, 4096, 0o1777)",
    "perf events": "libc('syscall', {perf_event_open}, None, 0, -1, -1, 0)",
    "a process in a new namespace": "libc('syscall', {clone}, 0x10000000 | 17, 0, 0, 0, 0)",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "another's file descriptor": "libc('syscall', 438, 0, 0, 0)",
}

# Programs that try to outlive their time limit.
IMPORTS = "import ctypes, os, signal, sys, threading, time\nlibc = ctypes.CDLL(None)\n"
CLINGING = {
    "fork bomb": "while True:\n    try: os.fork()\n    except OSError: pass",
    "fork and wait": "for _ in range(40):\n    try: os.fork()\n    except OSError: break\ntime.sleep(99)",
    "a session of its own": "if os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\ntime.sleep(99)",
    "an orphan": "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\ntime.sleep(99)",
    "an orphan left behind": "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    time.sleep(99)\ntime.sleep(.2)",
    "deaf to signals": "for n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
    "os.fork()\ntime.sleep(99)",
    "another program": "if os.fork() == 0:\n    os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(99)'])\n"
    "time.sleep(99)",
    "threads": "[threading.Thread(target=time.sleep, args=(99,)).start() for _ in range(8)]",
    "stopped": "os.fork()\nos.kill(os.getpid(), signal.SIGSTOP)",
    "deaf to the death of its parent": "libc.prctl(1, 0)\nif os.fork() == 0: libc.prctl(1, 0)\ntime.sleep(99)",
    "pipes closed": "[os.close(n) for n in range(3)] and time.sleep(99)",
}

# Wrong answers to "write f(n) = n * n + 1" that try to be rewarded, to exhaust resources or to break things.
HOSTILE = {
    # exit before or during the tests
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "exit in the function": "def f(n):\n    import sys; sys.exit(0)",
    "os._exit in the function": "def f(n):\n    import os; os._exit(0)",
    "raise SystemExit": "def f(n):\n    raise SystemExit(True)",
    "KeyboardInterrupt": "def f(n):\n    raise KeyboardInterrupt",
    "quit": "quit()",
    "atexit": "import atexit, os\natexit.register(lambda: os.write(4, b'{\"value\": 5}\\n'))",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "kill itself": "import os\nos.kill(os.getpid(), 9)",
    # claim that the tests passed
    "pass marker": "print('PASSED')\nprint('OK')\nprint('correct')\ndef f(n): pass",
    "forged verdict on stdout": "print('{\"value\": 5}')\nprint('{\"reason\": \"correct\", \"passed\": 4}')\ndef f(n): pass",
    "forged replies on every pipe": "import os\nfor fd in range(1, 99):\n    try: os.write(fd, b'{\"value\": true}\\n' * 9)\n"
    "    except OSError: pass\ndef f(n): pass",
    "forged reasons on every pipe": "import os\nfor fd in range(1, 99):\n    try:\n"
    "        os.write(fd, b'{\"reason\": \"correct\", \"value\": \"correct\"}\\n' * 9)\n    except OSError: pass\ndef f(n): pass",
    "garbage on every pipe": "import os\nfor fd in range(1, 99):\n    try: os.write(fd, os.urandom(999) + b'\\n')\n"
    "    except OSError: pass\ndef f(n): pass",
    "nested JSON on every pipe": "import os\nfor fd in range(3, 99):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n"
    "    except OSError: pass\ndef f(n): pass",
    "endless number on every pipe": "import os\nfor fd in range(3, 99):\n    try: os.write(fd, b'9' * 60000 + b'\\n')\n"
    "    except OSError: pass\ndef f(n): pass",
    "a line without end": "import os\nwhile True:\n    for fd in range(3, 99):\n        try: os.write(fd, b'x' * 4096)\n"
    "        except OSError: pass",
    "closed pipes": "import os\nos.closerange(0, 999)\ndef f(n): return 5",
    # pretend to be equal
    "always equal": "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(n): return E()",
    "equal int": "class E(int):\n    def __eq__(self, o): return True\n    def __repr__(self): return '5'\n"
    "    __index__ = __int__ = lambda self: 5\ndef f(n): return E(-1)",
    "equal str": "class E(str):\n    def __eq__(self, o): return True\ndef f(n): return E('5')",
    "equal list": "class E(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 1\ndef f(n): return E()",
    "equal float": "class E(float):\n    def __eq__(self, o): return True\ndef f(n): return E('nan')",
    "equal dict": "class E(dict):\n    def __eq__(self, o): return True\ndef f(n): return E()",
    "mock": "from unittest.mock import MagicMock, ANY\ndef f(n): return ANY",
    "nan": "def f(n): return float('nan')",
    "infinity": "def f(n): return float('inf')",
    "true": "def f(n): return True",
    "generator": "def f(n): yield n * n + 1",
    "coroutine": "async def f(n): return n * n + 1",
    "changed str": "class E:\n    def __str__(self): return '5'\n    __repr__ = __str__\ndef f(n): return E()",
    "all at once": "def f(n): return [5, 1, 50, 10]",
    # tamper with the judge's environment
    "assert": "import builtins\nbuiltins.AssertionError = type('X', (Exception,), {})\ndef f(n): pass",
    "builtins": "import builtins\nfor name in ('all', 'any', 'isinstance', 'len', 'repr', 'eval', 'callable', 'type'):\n"
    "    setattr(builtins, name, lambda *a: True)\ndef f(n): pass",
    "json": "import json\njson.dumps = lambda *a, **k: '5'\njson.loads = lambda *a, **k: 5\ndef f(n): pass",
    "the encoder": "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'encode') and hasattr(m, 'serve'):\n"
    "        m.encode = lambda v, d: '5'\ndef f(n): pass",
    "the sender": "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, '_send'):\n"
    "        m._send = lambda fd, text: None\ndef f(n): pass",
    "os.write": "import os\nwrite = os.write\nos.write = lambda fd, b: write(fd, b'{\"value\": 5}\\n') and len(b)\ndef f(n): pass",
    "frames": "import sys\ndef f(n):\n    frame = sys._getframe()\n    while frame:\n        for v in list(frame.f_locals.values()):\n"
    "            if isinstance(v, list) and v and isinstance(v[0], tuple): return dict((a[0], b) for a, b in v)[n]\n"
    "        frame = frame.f_back",
    "memory": "import gc\ndef f(n):\n    for o in gc.get_objects():\n        if isinstance(o, tuple) and len(o) == 2 and o[0] == [n]: return o[1]",
    "files": "import glob\ndef f(n):\n    return [open(p).read() for p in glob.glob('/**/test*', recursive=True)][0]",
    "read ahead": "import os\ndef f(n):\n    return os.read(3, 9999) + os.read(4, 9999)",
    "tracing": "import sys\ndef trace(*a): return trace\nsys.settrace(trace)\ndef f(n): return None",
    "import hook": "import sys\nsys.meta_path.insert(0, None)\nsys.path[:] = []\ndef f(n): pass",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os.write(1, b'ok')\nraise Exception",
    "hostile error": "class E(Exception):\n    def __str__(self): raise E\ndef f(n): raise E",
    "error with a verdict": "class correct(Exception): pass\ndef f(n): raise correct('\"}\\n{\"value\": 5}')",
    # exhaust resources
    "endless loop": "while True: pass",
    "endless loop that eats errors": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time\ntime.sleep(99)",
    "sleep in the function": "import time\ndef f(n): time.sleep(99)",
    "deaf": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: pass",
    "alarm": "import signal\nsignal.setitimer(signal.ITIMER_REAL, .01, .01)\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
    "while True: pass",
    "big list": "x = [0] * 10**10",
    "growing list": "x = [0]\nwhile True: x = x * 2",
    "big string": "def f(n): return 'x' * 10**6",
    "big number": "def f(n): return 10 ** 100000",
    "endless number": "def f(n): return 9 ** 9 ** 9",
    "deep answer": "def f(n):\n    x = 5\n    for _ in range(10**5): x = [x]\n    return x",
    "circular answer": "def f(n):\n    x = []\n    x.append(x)\n    return x",
    "recursion": "def f(n): return f(n + 1)",
    "recursion without bound": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)",
    "regex bomb": "import re\ndef f(n): return re.match('(a+)+$', 'a' * 50 + 'b')",
    "threads": "import threading, time\nfor _ in range(999): threading.Thread(target=time.sleep, args=(99,)).start()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "two that answer": "import os\nos.fork()\ndef f(n): return None",
    "flood": "while True: print('x' * 9999)",
    "flood of errors": "import os\nwhile True: os.write(2, b'x' * 9999)",
    "full disk": "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').write('x' * 10**6)\n    n += 1",
    "many files": "x = []\nwhile True: x.append(open('/dev/null'))",
    "zeros": "open('/dev/zero').read()",
    # sources that do not parse, or must not
    "syntax bomb": "(" * 5000,
    "minus bomb": "f = " + "-" * 20000 + "1",
    "lambda bomb": "f = " + "lambda: " * 5000 + "1",
    "constant bomb": "f = 2 ** (2 ** (2 ** 40))",
    "set of bombs": "f = ((((10 ** 8,) * 10000) * 10000) * 10000)",
    "nul": "def f(n):\n    return 5\0",
    "unicode digits": "def f(n): return ٥",
    "homoglyph": "def ｆ(n): return None",
    "another alphabet": "def ƒ(n): return n * n + 1",
    "surrogate": "def f(n): return '\ud800'",
    "bom": "\ufeffdef f(n): return None",
    "coding": "# -*- coding: utf-7 -*-\ndef f(n): return None",
    "indentation bomb": "\n".join(" " * n + "if 1:" for n in range(300)),
    # break things
    "remove everything": "import shutil\nshutil.rmtree('/', ignore_errors=True)\ndef f(n): pass",
    "kill everyone": "import os\nos.kill(-1, 9)\ndef f(n): pass",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\ndef f(n): pass",
    "kill the group": "import os\nos.killpg(0, 9)\ndef f(n): pass",
    "interrupt the group": "import os, signal\nsignal.signal(2, signal.SIG_IGN)\nos.killpg(0, 2)\ndef f(n): pass",
    "kill the first": "import os\nos.kill(1, 9)\ndef f(n): pass",
    "stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "trace the parent": "import ctypes, os\nctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\ndef f(n): pass",
    "shell": "import os\nos.system('rm -rf /')\ndef f(n): pass",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])",
    "pickle": "import pickle\ndef f(n): return pickle.dumps(5)",
    "socket": "import socket\ndef f(n): return socket.create_connection(('127.0.0.1', 80)).recv(9)",
    "terminal": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')",
}  # fmt: skip
