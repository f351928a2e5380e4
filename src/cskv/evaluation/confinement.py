"""What a confined process gives up before it runs a program that nobody has read.

Run as a script, with nothing but the standard library, by `cskv.evaluation.sandbox`. Standard input is JSON: the
program, its limits, the folder that it may write to, and a token that is printed once the program has come to its end.

Limits of `resource` bound time, memory, files and processes. On Linux the kernel then refuses, for good and without any
privilege, to reach files outside of the folder (Landlock) and to fork, execute, signal or open sockets (seccomp).
Everywhere an audit hook refuses the same from Python, which mistakes run into and determined code gets around.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

# System calls by machine: (audit architecture, clone, those that are refused).
SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        # socket, connect, bind, socketpair, fork, vfork, execve, kill, chmod, fchmod, chown, fchown, lchown, ptrace,
        # setxattr, lsetxattr, fsetxattr, fchownat, fchmodat, process_vm_writev, execveat, io_uring_setup, fchmodat2
        (41, 42, 49, 53, 57, 58, 59, 62, 90, 91, 92, 93, 94, 101, 188, 189, 190, 260, 268, 311, 322, 425, 452),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        # setxattr, lsetxattr, fsetxattr, fchmod, fchmodat, fchownat, fchown, ptrace, kill, socket, socketpair, bind,
        # connect, execve, process_vm_writev, execveat, io_uring_setup, fchmodat2
        (5, 6, 7, 52, 53, 54, 55, 117, 129, 198, 199, 200, 203, 221, 271, 281, 425, 452),
    ),
}
CLONE3, CLONE_THREAD = 435, 0x10000
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
NO_NEW_PRIVILEGES, SET_SECCOMP = 38, 22
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED_EVENTS = (
    *(
        "os.fork",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.startfile",
        "os.kill",
        "subprocess.",
        "pty.",
    ),
    *("socket.", "ctypes.", "signal.", "os.chmod", "os.chown", "os.lchmod", "os.setxattr", "os.removexattr", "syslog."),
)
WRITING_EVENTS = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime", "shutil."),
)


def main() -> None:
    """Read what is to be run, give everything else up, and run it."""
    asked = json.load(sys.stdin)
    token, folder = asked["token"], os.path.realpath(asked["folder"])
    try:
        _limit(asked["limits"])
        if sys.platform == "linux":
            _refuse_in_kernel(folder)
    except (OSError, ValueError) as error:
        print(f"{token} unconfined: {error}")
        return
    program = compile(asked["program"], "<program>", "exec")
    sys.addaudithook(_refusal(folder))
    exec(program, {"__name__": "__main__"})
    sys.stdout.write(f"\n{token}")
    sys.stdout.flush()
    os._exit(0)  # nothing that the program has left behind runs any more


def _limit(limits: dict[str, int]) -> None:
    for name, most in {**limits, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _refuse_in_kernel(folder: str) -> None:
    """Let the kernel hold what it can: an old one, or another machine, leaves some of it to the audit hook."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Superuser or not, no capability is left: version 3 of the header, this process, two empty sets.
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel cannot forbid new privileges")
    _restrict_files(libc, folder)
    _filter_calls(libc)


def _restrict_files(libc: Any, folder: str) -> None:
    """Allow writing below the folder, and reading there and where Python and its libraries lie (Landlock)."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    every = (1 << (13 + (version >= 2) + (version >= 3))) - 1
    fields = [every, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # network; sockets and signals
    ruleset = libc.syscall(LANDLOCK_CREATE, struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields), 0)
    execute_read_list = 1 | 4 | 8
    readable = (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__), "/usr", "/lib", "/lib64")
    for path, allowed in ((folder, every), *((path, execute_read_list) for path in readable)):
        with contextlib.suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH)
            if libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, opened), 0):
                raise OSError(ctypes.get_errno(), f"Landlock refuses {path}")
            os.close(opened)
    if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock cannot restrict this process")
    os.close(ruleset)


def _filter_calls(libc: Any) -> None:
    """Refuse processes, signals to others, sockets and changes of permissions (seccomp); threads are allowed."""
    if platform.machine() not in SYSTEM_CALLS or sys.byteorder != "little":
        return
    architecture, clone, refused = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, has, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, KILL), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 1 << 30), (leave, 0, 0, REFUSE | errno.EPERM)]  # another numbering of the same calls
    for call in refused:
        steps += [(equal, 0, 1, call), (leave, 0, 0, REFUSE | errno.EPERM)]
    steps += [(equal, 0, 1, CLONE3), (leave, 0, 0, REFUSE | errno.ENOSYS)]  # libraries then call clone
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (has, 1, 0, CLONE_THREAD), (leave, 0, 0, REFUSE | errno.EPERM)]
    steps += [(leave, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    if libc.prctl(SET_SECCOMP, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _refusal(folder: str) -> Any:
    """Return the audit hook."""

    def inside(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor, which was opened before
        found = os.path.realpath(os.fsdecode(path))
        return found == folder or found.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) if mode is None else not {"w", "a", "x", "+"}.isdisjoint(mode)
            refused = writes and not inside(path)
        elif event.startswith(WRITING_EVENTS):
            refused = not all(inside(path) for path in arguments[:2] if not isinstance(path, int))
        else:
            refused = event.startswith(REFUSED_EVENTS)
        if refused:
            raise PermissionError(errno.EPERM, f"a confined program may not do this: {event}")

    return hook


if __name__ == "__main__":
    main()
