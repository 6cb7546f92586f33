"""Confines the program: namespaces if bubblewrap is not installed, process 1 in them, limits and a call filter.

`enter_namespaces` makes user, mount, pid, network, IPC and UTS namespaces with three processes: the launcher stays
outside the new pid namespace and waits; its child is process 1 inside, with whose end the kernel ends every other
process of the namespace; the child of process 1 runs the program. Needs Linux 5.12 (mount_setattr).

`limit` takes away user id and capabilities, sets rlimits and filters system calls before this process runs the program.
It refuses the calls that reach outside (sockets, other processes' memory, keys, new namespaces, mounts), that hold
memory no rlimit counts (memfd, System V IPC), or that open a large part of the kernel (io_uring, bpf, perf). The filter
knows x86-64 and AArch64; other machines have only the namespaces.

Errors in C calls are OSError with the name of the call.
"""

import ctypes
import errno
import os
import resource
import select
import signal
import struct
import sys
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << n for n in (17, 25, 26, 27, 28, 29, 30))
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same on every architecture
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

NOBODY = 65534
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 5, 6, 7, 21
SCRATCH = b"mode=1777,size=%d,nr_inodes=4k"
"""Mount options of /tmp: a file or folder takes a kilobyte of kernel memory that the size does not count."""
STACK, FILES = 8 << 20, 64
WATCH_SECONDS = 0.1

_CALLS = {  # number on x86-64, on AArch64
    "socket": (41, 198), "clone": (56, 220), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "swapon": (167, 224), "acct": (163, 89),
    "quotactl": (179, 60), "reboot": (169, 142), "personality": (135, 92), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "perf_event_open": (298, 241),
    "bpf": (321, 280), "userfaultfd": (323, 282), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip
_SINCE_424 = {  # numbers from here on are the same everywhere
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438,
    "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447,
}  # fmt: skip
_CLONE3 = 435
NUMBERS = {
    machine: {name: numbers[place] for name, numbers in _CALLS.items()} | _SINCE_424
    for place, machine in enumerate(("x86_64", "aarch64"))
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_MAY_NOT_FORK = {"x86_64": (57, 58), "aarch64": ()}  # fork and vfork, where there are such calls
THREAD = 0x10000  # CLONE_THREAD
_NEW_NAMESPACES = 0x7E020000


def call(name: str, *args: object) -> int:
    """Call a C function. Integers go as C longs: variadic ones (prctl, syscall) read nothing narrower."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with(parent: int) -> None:
    """Have this process killed when the parent dies. Any later change of user or capabilities undoes this."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def report_pid(info: int, pid: int) -> None:
    """Report the process whose death ends the program, in the form of bubblewrap's --info-fd."""
    os.write(info, b'{"child-pid": %d}\n' % pid)
    os.close(info)


def fork_program(pipes: tuple[int, int]) -> None:
    """Return in a child; the caller, process 1 of the namespace, exits as that child does.

    When it exits, the kernel ends whatever is left in the namespace before it is gone itself.
    """
    pid = os.fork()
    if pid:
        exit_as(pid, pipes)


def protect() -> None:
    """Put this process, and its children until they take rights of their own, out of reach of ptrace.

    Process 1 of a namespace is ours and cannot be killed from inside, so with this the program cannot impersonate it.
    """
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def end_program(pid: int, isolated: bool) -> int:
    """Wait for child `pid`, end and reap what it has left behind, and return its exit status (128 + n after signal n).

    Only process 1 of a namespace may pass `isolated`: the kernel then ends every other process of it at once.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if isolated:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
    return code if code >= 0 else 128 - code


def fork_namespace() -> int:
    """Fork; the child is process 1 of a new pid namespace inside this one."""
    call("unshare", NEWPID)
    pid = os.fork()
    if pid:
        own = os.pidfd_open(os.getpid())
        call("setns", own, NEWPID)  # else the namespace of the next child could only lie in that of this one
        os.close(own)
    return pid


def end_namespace(pid: int) -> int:
    """End process 1 of a namespace inside this one, and with it every other, and return its exit status, which it may
    have had already (128 + n after signal n)."""
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def mount_scratch(size: int) -> None:
    _tmpfs(b"/tmp", SCRATCH % size)


def unmount_scratch() -> None:
    """With all processes gone, the memory of its files is free."""
    call("umount2", b"/tmp", MNT_DETACH)


def exit_as(pid: int, pipes: tuple[int, int]) -> None:
    """Close the pipes and exit as child `pid` does (128 + n after signal n), reaping all other children first."""
    for fd in pipes:
        os.close(fd)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def enter_namespaces(
    info: int, pipes: tuple[int, int], parent: int, scratch: int, paths: list[str], hidden: list[str]
) -> None:
    """Return in process 1 of the new namespace; the launcher never returns.

    The program may read `paths`, except for the folders in `hidden`, and write to /tmp if there is `scratch`.
    """
    _unshare()
    die_with(parent)
    _build_root(scratch, paths, hidden)
    go, gone = os.pipe()
    pid = os.fork()
    if pid:
        report_pid(info, pid)
        os.write(gone, b"g")
        exit_as(pid, pipes)
    os.close(info)
    os.close(gone)
    die_with(0)  # a parent outside the pid namespace has no number here
    if not os.read(go, 1):  # the launcher died before its death could be a signal
        os._exit(1)


def enter_bubblewrap(alive: int, scratch: int, mounts: bool) -> None:
    """In bubblewrap's process 1: mount /tmp (bubblewrap bounds no inodes), give up every right except those with which
    root becomes nobody and ends a program, and `mounts` for every program, and end with the trusted process, whose
    pidfd is `alive`."""
    if scratch:
        _tmpfs(b"/tmp", SCRATCH % scratch)
        os.chdir("/tmp")
    kept = sum(1 << n for n in (CAP_KILL, CAP_SETGID, CAP_SETUID)) if os.geteuid() == 0 else 0
    kept |= 1 << CAP_SYS_ADMIN if mounts else 0
    call("capset", struct.pack("=II", 0x20080522, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    _end_with(alive)


def _end_with(pidfd: int) -> None:
    """Exit soon after that process does. A timer interrupts whatever this process waits for, and its forks do not
    inherit it; a thread would be a process that the program sees."""
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    signal.signal(signal.SIGALRM, lambda *_: ended.poll(0) and os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, WATCH_SECONDS, WATCH_SECONDS)


def _unshare() -> None:
    """Enter new namespaces. Inside, NOBODY is nobody and 0 is root if the caller is root; else NOBODY is the caller.

    A child that stays outside writes the maps, because mapping two ids takes the rights of the outer namespace.
    """
    pid, root = os.getpid(), os.geteuid() == 0
    ready, done = os.pipe()
    helper = os.fork()
    if not helper:
        os.close(done)
        os.read(ready, 1)
        if not root:
            _write(f"/proc/{pid}/setgroups", "deny")
        for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
            _write(f"/proc/{pid}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1")
        os._exit(0)
    call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
    os.write(done, b"g")
    if os.waitpid(helper, 0)[1]:
        raise OSError("the ids of a user namespace cannot be mapped here")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _build_root(scratch: int, paths: list[str], hidden: list[str]) -> None:
    """Build the file system of the program and make it the root: a read-only tmpfs on which only `paths` appear.

    They keep their names, because this interpreter has already begun to import from them. The sources are opened first,
    because the new root is built over /tmp, which may contain one of them.
    """
    os.umask(0o022)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    handles = [(path, os.open(path, os.O_PATH)) for path in (*paths, *DEVICES)]
    _tmpfs(b"/tmp", b"mode=755,size=1m,nr_inodes=1k")
    os.chdir("/tmp")
    os.mkdir("empty", 0o111)
    os.mkdir("tmp")
    if scratch:
        _tmpfs(b"tmp", SCRATCH % scratch)
    for path, handle in handles:
        source, target = f"/proc/self/fd/{handle}", path.lstrip("/")
        _make_parents(target)
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
        if path not in DEVICES:
            _protect(target, AT_RECURSIVE)
        os.close(handle)
    for path in hidden:
        call("mount", b"empty", path.lstrip("/").encode(), None, MS_BIND, None)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    _protect("/", 0)
    os.chdir("/tmp")


def _tmpfs(target: bytes, options: bytes) -> None:
    call("mount", b"tmpfs", target, b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def _make_parents(target: str) -> None:
    """Make the parent folders, which can be passed through but not listed."""
    parent = os.path.dirname(target)
    if parent and not os.path.isdir(parent):
        _make_parents(parent)
        os.mkdir(parent, 0o111)


def _protect(target: str, flags: int) -> None:
    """Make a mount read-only, without set-id programs and devices; `flags` AT_RECURSIVE: also the mounts below it."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID | NO_DEVICES)
    size = ctypes.sizeof(attributes)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, ctypes.byref(attributes), size)


def limit(cpu: int, memory: int, file: int, processes: int, *, parent: int, isolated: bool) -> None:
    """Take rights away from this process. CPU in seconds, memory and file in bytes. If `isolated`, root becomes nobody.

    For root RLIMIT_NPROC counts nothing; for nobody it counts the processes of this user namespace, or before Linux
    5.14 all of the user's. Without namespaces a new process could survive, so none is allowed.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if isolated and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    bounds = {"CPU": cpu, "AS": memory, "FSIZE": file, "NPROC": processes, "NOFILE": FILES, "CORE": 0, "STACK": STACK}
    for name, value in bounds.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("capset", struct.pack("=II", 0x20080522, 0), bytes(24))
        die_with(parent)
        machine = os.uname().machine
        if machine in NUMBERS:
            _filter(instructions(machine) if isolated else instructions(machine, _MAY_NOT_FORK[machine], THREAD))


def _filter(instructions: list[tuple[int, int, int, int]]) -> None:
    text = b"".join(struct.pack("=HBBI", *one) for one in instructions)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


def instructions(machine: str, more: tuple[int, ...] = (), clone_needs: int = 0) -> list[tuple[int, int, int, int]]:
    """The BPF program over struct seccomp_data {nr, arch, ip, args[6]}: EPERM for the calls of NUMBERS, else allow.

    `more` are further calls to refuse, `clone_needs` a flag without which clone is refused. clone3 hides its flags
    behind a pointer, so it gets ENOSYS; the C library then uses clone, whose flags are visible.
    """
    load, jump_equal, jump_at_least, jump_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refused = [*(number for name, number in NUMBERS[machine].items() if name != "clone"), *more]
    allowed_at = 6 + len(refused)
    refused_at, absent_at, clone_at = allowed_at + 1, allowed_at + 2, allowed_at + 3

    def to(there: int, here: int) -> int:
        return there - here - 1  # a jump counts from the next instruction

    return [
        (load, 0, 0, 4),
        (jump_equal, 0, to(refused_at, 1), _AUDIT[machine]),
        (load, 0, 0, 0),
        (jump_at_least, to(refused_at, 3), 0, _X32),
        (jump_equal, to(absent_at, 4), 0, _CLONE3),
        (jump_equal, to(clone_at, 5), 0, NUMBERS[machine]["clone"]),
        *((jump_equal, to(refused_at, here), 0, number) for here, number in enumerate(refused, start=6)),
        (give, 0, 0, 0x7FFF0000),
        (give, 0, 0, 0x00050000 | errno.EPERM),
        (give, 0, 0, 0x00050000 | errno.ENOSYS),
        (load, 0, 0, 16),
        (jump_bits, 2, 0, _NEW_NAMESPACES),
        (jump_bits, 0, 1, clone_needs or 0xFFFFFFFF),
        (give, 0, 0, 0x7FFF0000),
        (give, 0, 0, 0x00050000 | errno.EPERM),
    ]
