"""The walls themselves, where bubblewrap is not there to build them: user, mount, pid, network, IPC and UTS namespaces.

Three processes: the launcher stays outside the new pid namespace and waits; its child is process 1 inside, which the
kernel takes every other process of the namespace down with; that one's child runs the program. The file system is a
read-only tmpfs on which only the given paths appear, under their own names, because this interpreter has already begun
to import from them; folders above them can be passed through but not listed. Needs Linux 5.12 (mount_setattr).
"""

import ctypes
import os

from first import fork_program, leave_as
from libc import call, die_with, tell

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << n for n in (17, 25, 26, 27, 28, 29, 30))
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same on every architecture
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def enter(info: int, pipes: tuple[int, int], parent: int, paths: list[str], hidden: list[str]) -> None:
    """Return in the process that is to run the program; the launcher and process 1 never return.

    `paths` is what it may read, but for the folders in `hidden`.
    """
    _unshare()
    die_with(parent)
    _build_root(paths, hidden)
    go, gone = os.pipe()
    first = os.fork()
    if first:
        tell(info, first)
        os.write(gone, b"g")
        leave_as(first, pipes)
    os.close(info)
    os.close(gone)
    die_with(0)  # a parent outside the pid namespace has no number here
    if not os.read(go, 1):  # the launcher died before its death could be a signal
        os._exit(1)
    fork_program(pipes)


def _unshare() -> None:
    """Into new namespaces; inside, 0 is root outside where we are root, and NOBODY is nobody, or else the caller.

    A child that stays outside writes the maps: to map two ids takes the rights of the outer namespace.
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


def _build_root(paths: list[str], hidden: list[str]) -> None:
    """The sources are opened first, because the new root is built over /tmp, where one of them may lie."""
    os.umask(0o022)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    handles = [(path, os.open(path, os.O_PATH)) for path in (*paths, *DEVICES)]
    _tmpfs(b"/tmp", b"mode=755,size=1m,nr_inodes=1k")
    os.chdir("/tmp")
    os.mkdir("empty", 0o111)
    os.mkdir("tmp")
    _tmpfs(b"tmp", b"mode=1777,size=16m,nr_inodes=4k")
    for path, handle in handles:
        source, target = f"/proc/self/fd/{handle}", path.lstrip("/")
        _above(target)
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


def _above(target: str) -> None:
    """Make the folders above, which can be passed through but not listed."""
    parent = os.path.dirname(target)
    if parent and not os.path.isdir(parent):
        _above(parent)
        os.mkdir(parent, 0o111)


def _protect(target: str, flags: int) -> None:
    """Read-only, without set-id programs and devices; `flags` AT_RECURSIVE for the mounts below it too."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID | NO_DEVICES)
    size = ctypes.sizeof(attributes)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, ctypes.byref(attributes), size)
