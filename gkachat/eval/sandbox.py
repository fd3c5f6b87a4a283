"""Runs Python that nobody has read: in a process that can compute, and little else.

outcome = run_code("assert 1 + 1 == 2")     # outcome.passed, .output, .why

The process takes its rights away from itself before it runs the code, by means that every user of Linux has, root or
not; where one of them is missing, nothing is run.
  seccomp    the few system calls that plain Python needs. None for networks, processes or threads, other processes
             (signals, ptrace, limits), modes of files, devices, shared memory; and as the code runs in the interpreter
             that is already there, none to start a program either.
  landlock   reads the interpreter's own library; reads and writes plain files in a directory of its own, which goes
             with it. So nothing of /proc, and nobody's keys.
  rlimits    CPU time, memory, the size of a file; and an environment, open files and a session of its own.
The parent counts wall time and files, and kills.

Not kept from the code is its own verdict: it runs beside its tests, and could look for what is printed when they pass.
"""

import ctypes
import math
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass

MOST_FILES = 64  # in the directory, and open
FILE_BYTES = 2**20  # of each of them, and of what is printed

# System calls with their numbers on x86-64 and arm64, where 0 is none, but for read on x86-64.
CALLS = """
    read 0 63 write 1 64 close 3 57 stat 4 0 fstat 5 80 lstat 6 0 poll 7 0 lseek 8 62 mmap 9 222 mprotect 10 226
    munmap 11 215 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 pread64 17 67 pwrite64 18 68
    readv 19 65 writev 20 66 access 21 0 select 23 0 sched_yield 24 124 mremap 25 216 madvise 28 233 dup 32 23
    dup2 33 0 nanosleep 35 101 getitimer 36 102 alarm 37 0 setitimer 38 103 getpid 39 172 exit 60 93 uname 63 160
    fsync 74 82 fdatasync 75 83 getcwd 79 17 chdir 80 49 rename 82 0 unlink 87 0 readlink 89 0 gettimeofday 96 169
    getrlimit 97 163 getrusage 98 165 sysinfo 99 179 times 100 153 getuid 102 174 getgid 104 176 geteuid 107 175
    getegid 108 177 getppid 110 173 sigaltstack 131 132 gettid 186 178 time 201 0 futex 202 98
    sched_getaffinity 204 123 getdents64 217 61 clock_gettime 228 113 clock_getres 229 114 clock_nanosleep 230 115
    exit_group 231 94 newfstatat 262 79 unlinkat 263 35 renameat 264 38 readlinkat 267 78 faccessat 269 48
    pselect6 270 72 ppoll 271 73 dup3 292 24 renameat2 316 276 getrandom 318 278 statx 332 291 rseq 334 293
    faccessat2 439 439
"""
# Those allowed with certain arguments: the numbers, which argument, what of it is looked at, what that may be.
# open: not to truncate what is opened for reading, which landlock did not see before Linux 6.2.
# fcntl, ioctl: what is about the file itself; others have signals sent to any process, or type into a terminal.
OPEN, ALL = (0o1003, (0, 1, 2, 0o1001, 0o1002)), 2**32 - 1
GUARDED = {
    "open": (2, 0, 1, *OPEN),
    "openat": (257, 56, 2, *OPEN),
    "fcntl": (72, 25, 1, ALL, (0, 1, 2, 3, 1030)),
    "ioctl": (16, 29, 1, ALL, (0x5450, 0x5451)),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # which number, and its name in the kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # landlock's system calls
READ, WRITE, TRUNCATE = 0b1100, 0b1_0010_0010, 1 << 14  # read files, list; write, remove and make plain files; 6.2
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Outcome:
    passed: bool
    """It came to its end without an error."""
    output: str
    """What it printed, errors included."""
    why: str
    """It did not pass; empty if it did."""


def run_code(source: str, *, seconds: float = 5.0, memory: int = 2**29) -> Outcome:
    """Run a program.

    Args:
        seconds: of CPU time, rounded up; of wall time it may take three times as much and two seconds more.
        memory: bytes of address space.

    Raises OSError where it cannot be kept in: not Linux, or a kernel without landlock (5.13) or seccomp.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise OSError(f"models' code is run on Linux only (x86-64, arm64); this is {sys.platform} {platform.machine()}")
    token, cpu = secrets.token_hex(16).encode(), max(1, math.ceil(seconds))
    with (
        tempfile.TemporaryDirectory(prefix="gkachat-sandbox-") as directory,
        tempfile.TemporaryFile() as given,
        tempfile.NamedTemporaryFile() as printed,
        open(printed.name, "ab") as appended,  # what was written stays
    ):
        given.write(token + source.encode(errors="replace"))
        given.seek(0)
        limits = [directory, str(cpu), str(memory), str(os.getpid())]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", os.path.abspath(__file__), *limits],
            stdin=given,
            stdout=appended,
            stderr=appended,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory},
            start_new_session=True,
        )
        killed = _watch(process, directory, 3 * seconds + 2)
        began, output = printed.read(len(token)), printed.read()
    if began != token and not killed:
        told = (began + output).decode(errors="replace").strip() or f"exit status {process.returncode}"
        raise OSError(f"models' code is not run, as it could not be kept in: {told.splitlines()[-1]}")
    passed = not killed and process.returncode == 0 and output.endswith(token)
    if not passed and not killed and len(token + output) >= FILE_BYTES:
        killed = f"printed more than {FILE_BYTES} bytes"
    text = output.removesuffix(token).decode(errors="replace")
    return Outcome(passed, text, "" if passed else killed or _why(process.returncode, text, cpu))


def _watch(process: subprocess.Popen, directory: str, wall: float) -> str:
    """Wait for its end, or see to it; what it was killed for."""
    end = time.monotonic() + wall
    try:
        while True:
            try:
                process.wait(0.02)
                return ""
            except subprocess.TimeoutExpired:
                if time.monotonic() > end:
                    return f"took more than {wall:g} s"
                if len(os.listdir(directory)) > MOST_FILES:
                    return f"made more than {MOST_FILES} files"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _why(code: int, text: str, cpu: int) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {cpu} s of CPU time"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (text.strip().splitlines() or [""])[-1] if code else "ended itself before its end"


def _run_confined(directory: str, cpu: str, memory: str, parent: str) -> None:
    """What the process does: stdin holds the token and the code."""
    given = sys.stdin.buffer.read()
    token, source = given[:32], given[32:].decode()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # is 0 now
    try:
        _confine(directory, int(cpu), int(memory), int(parent))
    except BaseException as error:
        os.write(1, f"{error!r}".encode())
        os._exit(1)
    os.write(1, token)
    sys.argv, main = ["code"], type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(source, "<code>", "exec"), main.__dict__)
        sys.__stdout__.flush()
        os.write(1, token)
        os._exit(0)
    except BaseException:
        sys.__stdout__.flush()
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def _confine(directory: str, cpu: int, memory: int, parent: int) -> None:
    """Give up all rights but those at the top of this file, for good."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ask(function: str, *arguments: int | bytes | None) -> int:
        typed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result = getattr(libc, function)(*typed)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{function}{arguments[:2]} is refused ({os.strerror(number)})")
        return result

    ask("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() != parent:
        raise OSError("the parent is gone")
    for what, limit in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, MOST_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit + (what == resource.RLIMIT_CPU)))  # asked to end, then made to
    ask("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: what the next two require
    version = ask("syscall", CREATE_RULESET, None, 0, 1)
    rights, truncate = (1 << 13 + min(2, version - 1)) - 1, TRUNCATE if version >= 3 else 0
    ruleset = ask("syscall", CREATE_RULESET, struct.pack("Q", rights), 8, 0)
    allowed = {path: READ for path in (*sys.path, os.path.join(sys.base_prefix, "lib"), *SYSTEM)}
    for path, right in {**allowed, directory: READ | WRITE | truncate}.items():
        if os.path.exists(path):
            right = right if os.path.isdir(path) else right & 0b100
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            ask("syscall", ADD_RULE, ruleset, 1, struct.pack("=Qi", right, beneath), 0)
            os.close(beneath)
    ask("syscall", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    ask("prctl", 22, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)), 0, 0)  # PR_SET_SECCOMP, filter
    for forbidden in (lambda: os.kill(os.getpid(), 0), lambda: os.open("/proc/self/environ", os.O_RDONLY)):
        try:
            forbidden()
        except PermissionError:
            continue
        raise OSError("the kernel says yes and does not do it")


def _filter() -> bytes:
    """The program of seccomp: allow what is listed, refuse the rest with EPERM, kill another architecture's calls."""
    load, equal, mask, answer = 0x20, 0x15, 0x54, 0x06  # BPF: A = data[k]; A == k?; A &= k; return k
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    column, architecture = ARCHITECTURES[platform.machine()]
    words = CALLS.split()
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for name, *numbers in zip(words[::3], map(int, words[1::3]), map(int, words[2::3]), strict=True):
        if numbers[column] or (name == "read" and not column):
            steps += [(equal, 0, 1, numbers[column]), (answer, 0, 0, allow)]
    for *numbers, argument, part, values in GUARDED.values():
        if numbers[column]:
            steps += [(equal, 0, 3 + 2 * len(values), numbers[column]), (load, 0, 0, 16 + 8 * argument)]
            steps += [(mask, 0, 0, part)]
            steps += [step for value in values for step in ((equal, 0, 1, value), (answer, 0, 0, allow))]
            steps += [(answer, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (answer, 0, 0, refuse)])


if __name__ == "__main__":
    _run_confined(*sys.argv[1:])
