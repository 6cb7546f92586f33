"""Taking rights away from this process before it runs the program: user id, capabilities, rlimits, system calls.

What is refused are the calls that reach outside (sockets, other processes' memory, keys, new namespaces, mounts), that
hold memory no rlimit counts (memfd, System V IPC), or that open a large part of the kernel (io_uring, bpf, perf).
The filter knows x86-64 and AArch64; on other machines the namespaces stand alone.
"""

import ctypes
import errno
import os
import resource
import struct
import sys

from libc import PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, call, die_with

NOBODY = 65534
STACK, FILES = 8 << 20, 64

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


def apply(cpu: int, memory: int, file: int, processes: int, *, parent: int, isolated: bool) -> None:
    """CPU in seconds, memory and file in bytes. Behind walls (isolated) root becomes nobody, as they were built for.

    For root RLIMIT_NPROC counts nothing; for nobody it counts the processes of this user namespace, or before Linux
    5.14 all of the user's. Without walls a new process could stay behind, so there is to be none.
    """
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
    """The BPF program over struct seccomp_data {nr, arch, ip, args[6]}: EPERM for what is named above, else allow.

    `more` are further calls to refuse, `clone_needs` a flag without which clone is refused. clone3 hides its flags
    behind a pointer: ENOSYS, upon which the C library uses clone, whose flags are seen.
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
