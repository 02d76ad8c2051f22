"""The system calls a sandboxed program is refused, assembled into a classic BPF filter without libseccomp."""

from __future__ import annotations

import errno
import os
import platform
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Value of `seccomp_data.arch` for each supported machine. Source: linux/audit.h."""

DENIED: dict[str, tuple[int | None, int | None]] = {
    # Looking into, or at, other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Large attack surface in the kernel, no use to a Python program.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "ioperm": (173, None),
    "iopl": (172, None),
    "fanotify_init": (300, 262),
    # File systems and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # The kernel itself: keys, modules, clocks.
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    # Network, a second layer under the empty network namespace.
    "socket": (41, 198),
    "socketpair": (53, 199),
    # Memory that neither RLIMIT_AS nor the sum of resident sets sees.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
"""Refused with EPERM: name -> number on (x86_64, aarch64), None where the machine lacks it. Source: asm/unistd.h."""

DENIED_TO_SCORERS: dict[str, tuple[int | None, int | None]] = {
    # A scorer runs as the trainer's user and outside of bubblewrap: it computes, and touches nothing.
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "prlimit64": (302, 261),
    "creat": (85, None),
    "truncate": (76, 45),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "rmdir": (84, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
}
"""Refused with EPERM to a scorer besides `DENIED`; opening a file for writing is refused too."""

_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CLONE, _CLONE3, _IOCTL, _PRCTL = (56, 220), (435, 435), (16, 29), (157, 167)
_CLONE_NEW_FLAGS = 0x7E020000
"""CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET. Source: linux/sched.h."""
_CLONE_THREAD = 0x10000
"""A `clone` without it makes a process. Source: linux/sched.h."""
_TERMINAL_INJECTION = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: type into somebody else's terminal. Source: asm/ioctls.h."""
_PR_SET_PDEATHSIG = 1
"""A program that unset it would outlive the trainer."""
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS


def filter_program(machine: str | None = None, *, for_scorer: bool = False) -> bytes:
    """Assemble the filter for a machine: kill foreign architectures, refuse `DENIED`, allow the rest.

    `clone` may not make namespaces; `clone3` answers ENOSYS because a filter cannot read its struct (libc falls back to
    `clone`), so the filter keeps user namespaces away even where bubblewrap's `--disable-userns` does not work.

    Args:
        machine: `x86_64` or `aarch64`; None takes this machine's.
        for_scorer: refuse `DENIED_TO_SCORERS`, new processes and opening files for writing too.

    Returns:
        An array of `struct sock_filter`, what `bwrap --seccomp` reads.

    Raises:
        ValueError: another machine, whose system call numbers we do not have.

    Source: linux/seccomp.h, linux/filter.h.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise ValueError(f"no system call table for this machine: got {machine!r}, expected one of {sorted(AUDIT_ARCH)}")
    column = list(AUDIT_ARCH).index(machine)
    code = [_step(_LOAD, _ARCH), _step(_JUMP_EQ, AUDIT_ARCH[machine], skip_if_true=1), _step(_RETURN, _KILL), _step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        code += [_step(_JUMP_GE, _X32_BIT, skip_if_false=1), _step(_RETURN, _EPERM)]
    for numbers in (DENIED | DENIED_TO_SCORERS if for_scorer else DENIED).values():
        number = numbers[column]
        if number is not None:
            code += [_step(_JUMP_EQ, number, skip_if_false=1), _step(_RETURN, _EPERM)]
    if for_scorer:
        code += _argument_rule(_CLONE[column], _ARG0, [_step(_JUMP_SET, _CLONE_THREAD, skip_if_true=1)])
        code += [_step(_JUMP_EQ, _OPENAT2[column], skip_if_false=1), _step(_RETURN, _ENOSYS)]
        for numbers, argument in ((_OPEN, _ARG1), (_OPENAT, _ARG2)):
            number = numbers[column]
            if number is not None:
                code += _argument_rule(number, argument, [_step(_JUMP_SET, _OPEN_TO_WRITE, skip_if_false=1)])
    code += [_step(_JUMP_EQ, _CLONE3[column], skip_if_false=1), _step(_RETURN, _ENOSYS)]
    code += _argument_rule(_CLONE[column], _ARG0, [_step(_JUMP_SET, _CLONE_NEW_FLAGS, skip_if_false=1)])
    code += _argument_rule(_IOCTL[column], _ARG1, [_step(_JUMP_EQ, request, skip_if_false=1) for request in _TERMINAL_INJECTION])
    code += _argument_rule(_PRCTL[column], _ARG0, [_step(_JUMP_EQ, _PR_SET_PDEATHSIG, skip_if_false=1)])
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _step(opcode: int, operand: int, *, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", opcode, skip_if_true, skip_if_false, operand)


def _argument_rule(number: int, argument: int, tests: list[bytes]) -> list[bytes]:
    """Refuse one system call where a test of one argument's low 32 bits falls through; allow it where all skip."""
    body = [_step(_LOAD, argument)]
    for test in tests:
        body += [test, _step(_RETURN, _EPERM)]
    body.append(_step(_RETURN, _ALLOW))
    return [_step(_JUMP_EQ, number, skip_if_false=len(body)), *body]
