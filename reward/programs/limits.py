"""What confines a process that runs a policy's program, without root and without further packages.

Every layer is tried, and the caller is told which ones hold (`confine`). They overlap on purpose:

- seccomp refuses by system call: processes, signals, sockets, permissions, other processes' memory.
- Landlock refuses by path: reading outside Python's own folders, writing outside one folder.
- Namespaces (user, process, network, IPC) leave nothing to reach: they are the second lock where a kernel has no
  Landlock, which must keep the program from reading its parents' environment through /proc.
- Resource limits bound processor time, memory and file size, and capabilities are given up, for root obeys few
  limits.

Numbers are the kernel's ABI (linux/landlock.h, linux/seccomp.h, linux/capability.h, unistd.h).
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_CAPABILITY_VERSION_3 = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
_ALL_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# Older versions cannot refuse truncation, so that writing is left to seccomp.
_WRITABLE_FROM_ABI = 3
_READABLE = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _syscall(number: int, *arguments: object) -> int:
    return int(_libc.syscall(ctypes.c_long(number), *arguments))


def _prctl(option: int, value: int) -> bool:
    return _libc.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))) == 0


def guard_judge(parent_pid: int) -> bool:
    """Make the judge unreadable, tell it by SIGTERM when its parent ends; False if the parent is gone already."""
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent_pid


def enter_namespaces() -> bool:
    """Move this process, and its next child as process 1, to namespaces of their own; False where it is refused."""
    return _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC) == 0


def limit_resources(cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Set hard limits; for processor time it is SIGKILL, which no program can handle."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


def confine(folder: str, without: list[str], filters: list[list[str]]) -> list[str]:
    """Confine this process for good, and return which of `seccomp` and `landlock` hold.

    Files can be written in `folder` only, and nowhere if Landlock is missing. `without` leaves layers out.
    `filters` has seccomp's programs in hexadecimal, where Landlock does not keep the writing and where it does.
    """
    held = []
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    abi = 0 if "landlock" in without else max(0, _landlock_version())
    writable = abi >= _WRITABLE_FROM_ABI
    if abi > 0 and _restrict_paths(folder, abi, writable):
        held.append("landlock")
    else:
        writable = False
    _drop_capabilities()
    # After the last change of credentials, which clears it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    programs = [] if "seccomp" in without else filters[writable]
    if programs and all(_install(bytes.fromhex(program)) for program in programs):
        held.append("seccomp")
    return held


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install(instructions: bytes) -> bool:
    """Install a filter for this thread and all later ones; PR_SET_NO_NEW_PRIVS must have been set."""
    program = _Program(len(instructions) // 8, instructions)
    arguments = (ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), ctypes.c_ulong(0), ctypes.c_ulong(0))
    return bool(_libc.prctl(_PR_SET_SECCOMP, *arguments) == 0)


def _landlock_version() -> int:
    return _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def _restrict_paths(folder: str, abi: int, writable: bool) -> bool:
    file_rights = _ALL_FILE_RIGHTS[max(version for version in _ALL_FILE_RIGHTS if version <= abi)]
    # File rights; bind and connect by TCP (ABI 4); abstract sockets and signals (ABI 6). No rule grants the latter.
    attributes = [file_rights, 0b11, 0b11][: 1 + (abi >= 4) + (abi >= 6)]
    buffer = (ctypes.c_uint64 * len(attributes))(*attributes)
    ruleset = _syscall(_LANDLOCK_CREATE, buffer, ctypes.c_size_t(ctypes.sizeof(buffer)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    read = _READ_FILE | _READ_DIR
    # Python's own folders may lie anywhere; with -I -S the path holds nothing else.
    own = [*sys.path, os.path.join(sys.base_prefix, "lib"), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]  # noqa: PTH118
    rules = dict.fromkeys([*_READABLE, *own], read) | dict.fromkeys(_DEVICES, read | _WRITE_FILE)
    rules[folder] = read | ((_WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE) if writable else 0)
    for path, rights in rules.items():
        _allow(ruleset, path, rights)
    restricted = _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return restricted


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Grant `rights` on a path; one that does not exist needs no rule."""
    if not path.startswith("/"):
        return
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):  # noqa: PTH112
        rights &= _READ_FILE | _WRITE_FILE
    rule = _PathRule(rights, descriptor)
    _syscall(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
    os.close(descriptor)


def _drop_capabilities() -> None:
    number = _CAPSET.get(os.uname().machine)
    if number is not None:
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        _syscall(number, header, (ctypes.c_uint32 * 6)())
