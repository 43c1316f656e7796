"""A seccomp filter for x86_64 and aarch64, assembled by hand: what a program under test may not ask of the kernel.

It lists what is refused, because what Python and the C library need differs between versions. System calls newer
than pidfd_send_signal (424) do not exist for the program, with two exceptions: so neither io_uring nor clone3 nor
what future kernels bring needs an entry (the C library falls back to clone). Capabilities are dropped besides, so
that calls which need one are not listed.

Refused calls return EPERM. A call through another architecture's table (32-bit on x86_64) kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_KILL, _ALLOW, _REFUSE, _MISSING = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _JUMP_EQUAL, _JUMP_NOT_LESS, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
# From here on both architectures count alike.
_FIRST_NEW, _CLOSE_RANGE, _FACCESSAT2 = 424, 436, 439

# (x86_64, aarch64); None where it does not exist.
if TYPE_CHECKING:
    _Numbers = tuple[int | None, int | None]
    _Rule = tuple[_Numbers, int, int, tuple[int, ...]]
_REFUSED: dict[str, _Numbers] = {
    # network; socketpair is below
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201)},
    **{"accept": (43, 202), "accept4": (288, 242)},
    # signals, priorities, groups and affinity, of others too
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140), "ioprio_set": (251, 30)},
    **{"sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119)},
    **{"sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    # new processes; clone is below
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    # other processes' memory
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    # this process's own confinement (prctl could undo the signal at its parent's death), and the kernel's surface
    **{"prctl": (157, 167), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"setns": (308, 268), "unshare": (272, 97), "bpf": (321, 280), "userfaultfd": (323, 282)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262)},
    **{"io_setup": (206, 0)},
    # memory that no limit counts, or that outlives the process
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},
    **{"memfd_create": (319, 279)},
    # what Landlock does not see: owners, modes, times and attributes of files
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "truncate": (76, 45)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
}
# Refused as well where Landlock does not keep writing inside one folder; open and openat are below.
_WRITING: dict[str, _Numbers] = {
    **{"creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None)},
    **{"unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38)},
    **{"renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None)},
    **{"symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33)},
}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is O_TMPFILE's own bit

# (x86_64, aarch64), argument, mask, values: allowed only if the masked argument is one of the values.
_ONLY_IF: tuple[_Rule, ...] = (
    ((56, 220), 0, 0x10000, (0x10000,)),  # clone: CLONE_THREAD
    # socketpair: SOCK_STREAM, for asyncio. A datagram socket could still be pointed at any path.
    ((53, 199), 1, 0xF, (1,)),
    ((302, 261), 0, 0xFFFFFFFF, (0,)),  # prlimit64: this process
    # ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
)
_ONLY_IF_READING: tuple[_Rule, ...] = (
    ((2, None), 1, _FOR_WRITING, (0,)),  # open
    ((257, 56), 2, _FOR_WRITING, (0,)),  # openat
)
# fcntl: F_SETOWN, F_SETSIG and F_SETOWN_EX send signals of choice to processes of choice.
_FCNTL, _FCNTL_SIGNALS = (72, 25), (8, 10, 15)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _return_if_equal(value: int, verdict: int) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, value, 0, 1), _instruction(_RETURN, verdict)]


def _by_argument(number: int, argument: int, mask: int, values: tuple[int, ...], hit: int, miss: int) -> list[bytes]:
    # The lower half of the argument: all that is compared here are C ints.
    body = [_instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * argument), _instruction(_AND, mask)]
    for value in values:
        body += _return_if_equal(value, hit)
    body.append(_instruction(_RETURN, miss))
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def assemble(machine: str, writable: bool) -> bytes | None:
    """Return the filter's instructions, or None for a machine whose numbers are not known here."""
    if machine not in _AUDIT_ARCH:
        return None
    column = list(_AUDIT_ARCH).index(machine)
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_OFFSET),
        *_return_if_equal(_CLOSE_RANGE, _ALLOW),
        *_return_if_equal(_FACCESSAT2, _ALLOW),
        _instruction(_JUMP_NOT_LESS, _FIRST_NEW, 0, 1),
        _instruction(_RETURN, _MISSING),
    ]
    for numbers in (_REFUSED if writable else _REFUSED | _WRITING).values():
        number = numbers[column]
        if number is not None:
            program += _return_if_equal(number, _REFUSE)
    for numbers, argument, mask, values in _ONLY_IF if writable else _ONLY_IF + _ONLY_IF_READING:
        number = numbers[column]
        if number is not None:
            program += _by_argument(number, argument, mask, values, _ALLOW, _REFUSE)
    program += _by_argument(_FCNTL[column], 1, 0xFFFFFFFF, _FCNTL_SIGNALS, _REFUSE, _ALLOW)
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(libc: Any, writable: bool) -> bool:
    """Install the filter for this thread and all later ones; False if the kernel or machine has none.

    PR_SET_NO_NEW_PRIVS must have been set. With `writable` the file system is left to Landlock.
    """
    instructions = assemble(os.uname().machine, writable)
    if instructions is None:
        return False
    program = _Program(len(instructions) // 8, instructions)
    arguments = (ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), ctypes.c_ulong(0), ctypes.c_ulong(0))
    return bool(libc.prctl(_PR_SET_SECCOMP, *arguments) == 0)
