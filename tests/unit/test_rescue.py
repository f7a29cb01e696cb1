"""Taking write protection off the memory of another process, told of real processes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from qsnapd.errors import NothingToRescue, SessionLost
from qsnapd.vm.identity import identify
from qsnapd.vm.rescue import MemoryRange, protected_memory, release_memory

SIZE_BYTES = 16 * 4096
MISSING, PROTECTED = 1, 2
"""How a range can be registered with a userfaultfd (linux/userfaultfd.h)."""

GUEST = f"""
import ctypes, fcntl, mmap, struct, threading
libc = ctypes.CDLL(None)
mode = int(sys.argv[1])
memory = mmap.mmap(-1, {SIZE_BYTES})
memory[:] = b"old!" * ({SIZE_BYTES} // 4)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
owner = libc.syscall(323, 1)  # of user mode only: anybody may
fcntl.ioctl(owner, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
fcntl.ioctl(owner, 0xC020AA00, struct.pack("QQQQ", start, {SIZE_BYTES}, mode, 0))
if mode == {PROTECTED}:
    fcntl.ioctl(owner, 0xC018AA06, struct.pack("QQQ", start, {SIZE_BYTES}, 1))
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
def write():
    libc.memcpy(start, b"new", 3)
    print("written", memory[:4], flush=True)
print(f"{{start:x}}", flush=True)
if mode == {PROTECTED}:
    threading.Thread(target=write, daemon=True).start()
input()
"""
"""Protects memory of its own, as QEMU does, and then writes to it: it sleeps for ever."""


@contextmanager
def guest(mode: int) -> Iterator["subprocess.Popen[str]"]:
    """Run GUEST; it has said where its memory is."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{GUEST}", str(mode)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def said(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_writer_goes_on() -> None:
    with guest(PROTECTED) as child:
        memory = MemoryRange(int(said(child), 16), SIZE_BYTES)
        identity = identify(child.pid)
        assert protected_memory(identity) == (memory,)
        assert release_memory(identity) == (memory,)
        assert said(child) == "written b'new!'"
        assert protected_memory(identity) == ()
        with pytest.raises(NothingToRescue):
            release_memory(identity)


def test_another_process_with_the_same_pid_is_left_alone() -> None:
    with guest(PROTECTED) as child:
        said(child)
        now = identify(child.pid)
        former = replace(now, start_time_ticks=now.start_time_ticks - 1)
        for touch in (protected_memory, release_memory):
            with pytest.raises(SessionLost):
                touch(former)
        assert len(protected_memory(now)) == 1


def test_memory_that_is_still_to_come_is_left_alone() -> None:
    """As in a postcopy migration: whoever released it would let the guest read zeroes."""
    with guest(MISSING) as child:
        said(child)
        assert protected_memory(identify(child.pid)) == ()
        with pytest.raises(NothingToRescue):
            release_memory(identify(child.pid))


def test_a_process_without_a_userfaultfd_is_left_alone() -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        try:
            with pytest.raises(NothingToRescue):
                release_memory(identify(child.pid))
        finally:
            child.kill()


def test_nobody_but_who_may_trace_it() -> None:
    look = (
        "import os\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from qsnapd.errors import VmError\n"
        "from qsnapd.vm.identity import identify\n"
        "from qsnapd.vm.rescue import release_memory\n"
        "try: release_memory(identify(1))\n"
        "except VmError as exc: print(exc)"
    )
    argv = [sys.executable, "-c", look]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "run as root" in done.stdout
