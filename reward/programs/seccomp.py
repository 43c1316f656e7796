"""What a program under test may not ask of the kernel: seccomp filters for x86_64 and aarch64, compiled by seccompy.

It lists what is refused, because what Python and the C library need differs between versions. System calls newer
than pidfd_send_signal (424) do not exist for the program, with two exceptions: so neither io_uring nor clone3 nor
what future kernels bring needs an entry (the C library falls back to clone). Capabilities are dropped besides, so
that calls which need one are not listed.

Refused calls return EPERM. A call through another architecture's table (32-bit on x86_64) kills the process.

The parent compiles and the child installs (`reward.programs.limits`): to import seccompy takes longer than a program.
"""

import errno
import os

from seccompy import Action, CmpOp, Filter, UnsupportedError, arch, bpf

# From here on both architectures count alike.
_FIRST_NEW, _CLOSE_RANGE, _FACCESSAT2 = 424, 436, 439
_NUMBER_OFFSET = 0
# The lower half of an argument: all that is compared here are C ints.
_C_INT = 0xFFFFFFFF

_REFUSED = (
    # network; socketpair is below
    *("socket", "connect", "bind", "listen", "accept", "accept4"),
    # signals, priorities, groups and affinity, of others too
    *("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "setpgid", "setsid", "setpriority"),
    *("ioprio_set", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"),
    # new processes; clone is below
    *("fork", "vfork", "execve", "execveat"),
    # other processes' memory
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "migrate_pages", "move_pages"),
    # this process's own confinement (prctl could undo the signal at its parent's death), and the kernel's surface
    *("prctl", "mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "bpf", "userfaultfd", "keyctl"),
    *("add_key", "request_key", "perf_event_open", "name_to_handle_at", "open_by_handle_at", "fanotify_init"),
    "io_setup",
    # memory that no limit counts, or that outlives the process
    *("shmget", "semget", "msgget", "mq_open", "mq_unlink", "memfd_create"),
    # others' memory, semaphores and queues of System V, which need no get: their numbers can be guessed
    *("shmat", "shmctl", "semop", "semtimedop", "semctl", "msgsnd", "msgrcv", "msgctl"),
    # what Landlock does not see: owners, modes, times and attributes of files
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "truncate"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
    *("utime", "utimes", "futimesat", "utimensat"),
)
# Refused as well where Landlock does not keep writing inside one folder; open and openat are below.
_WRITING = (
    *("creat", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2"),
    *("link", "linkat", "symlink", "symlinkat", "mknod", "mknodat"),
)
# aarch64 never had these.
_X86_ONLY = {
    *("fork", "vfork", "chmod", "chown", "lchown", "utime", "utimes", "futimesat", "open", "creat"),
    *("mkdir", "rmdir", "unlink", "rename", "link", "symlink", "mknod"),
}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is O_TMPFILE's own bit

# Call, argument, mask, values: allowed only if the masked argument is one of the values.
_ONLY_IF = (
    ("clone", 0, 0x10000, (0x10000,)),  # CLONE_THREAD
    # SOCK_STREAM, for asyncio. A datagram socket could still be pointed at any path.
    ("socketpair", 1, 0xF, (1,)),
    ("prlimit64", 0, _C_INT, (0,)),  # this process
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ("ioctl", 1, _C_INT, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
)
_ONLY_IF_READING = (("open", 1, _FOR_WRITING, (0,)), ("openat", 2, _FOR_WRITING, (0,)))
# F_SETOWN, F_SETSIG and F_SETOWN_EX send signals of choice to processes of choice.
_FCNTL_SIGNALS = (8, 10, 15)


def compile_filters(writable: bool) -> list[bytes]:
    """Return the programs of two filters, to be installed in this order; none for a machine that seccompy lacks.

    With `writable` the file system is left to Landlock.
    """
    try:
        missing = _X86_ONLY if arch() == "aarch64" else set[str]()
    except UnsupportedError:
        return []
    listed = Filter(default=Action.ALLOW)
    for name in _REFUSED if writable else _REFUSED + _WRITING:
        if name not in missing:
            listed.errno(name, errno.EPERM)
    # Of the rules for one call the first that matches holds.
    for name, argument, mask, values in _ONLY_IF if writable else _ONLY_IF + _ONLY_IF_READING:
        if name not in missing:
            for value in values:
                listed.allow(name, args=[(argument, CmpOp.MASKED_EQ, value, mask)])
            listed.errno(name, errno.EPERM)
    for value in _FCNTL_SIGNALS:
        listed.errno("fcntl", errno.EPERM, args=[(1, CmpOp.MASKED_EQ, value, _C_INT)])
    return [_newer(), listed.program]


def _newer() -> bytes:
    """A filter of its own, because a rule of seccompy names one call. The kernel takes the stricter of two verdicts."""
    known = [bpf.Jump(bpf.BPF_JEQ, number, "known") for number in (_CLOSE_RANGE, _FACCESSAT2)]
    first = bpf.Jump(bpf.BPF_JGEQ, _FIRST_NEW, None, "known")
    verdicts = [bpf.Ret(Action.ERRNO | errno.ENOSYS), bpf.Ret(Action.ALLOW)]
    return bpf.assemble([bpf.Load(_NUMBER_OFFSET), *known, first, *verdicts], {"known": 5})
