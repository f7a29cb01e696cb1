"""A tar stream to a descriptor that a client has sent: written by GNU tar, which can be killed.

Whoever reads the stream may be slow or gone, which is no concern of the daemon's event loop
or threads: only the tar process ever waits for them.
"""

import fcntl
import os
import signal
import stat
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import Effect, StoreError, TargetRefused
from qsnapd.snapshot.moving.beside import with_watcher
from qsnapd.snapshot.moving.meter import Meter

TAR = "tar"
STALL_LIMIT_S = 3600.0
"""How long whoever reads the stream may do nothing."""
_LOOK_EVERY_S = 0.25
_WORDS_BYTES = 2000
TAR_OPTIONS = (
    *("--create", "--file=-", "--format=posix"),
    *("--sparse", "--hole-detection=seek", "--dereference"),
    # the same files give the same stream, whoever's they are
    *("--numeric-owner", "--owner=0", "--group=0", "--mode=0600", "--mtime=@0"),
    "--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f",
)


def require_writable(descriptor: int) -> None:
    """Refuse a descriptor that a stream cannot be written to. Raises: TargetRefused."""
    mode = os.fstat(descriptor).st_mode
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_RDONLY or flags & os.O_PATH or stat.S_ISDIR(mode):
        raise TargetRefused("the descriptor that was sent along is not open for writing")
    if os.isatty(descriptor):
        raise TargetRefused("a tar stream is not written to a terminal: name a file, or use a pipe")


async def write_tar(
    folder: Path, names: Sequence[str], descriptor: int, linked: Sequence[int], meter: Meter
) -> None:
    """Write the files *names* of *folder*, in that order, holes kept.

    *linked* are the descriptors that links in the folder lead to.
    On failure or cancellation: the stream ends somewhere.
    Raises: StoreError.
    """
    command = [TAR, *TAR_OPTIONS, f"--directory={folder}", "--no-recursion", "--", *names]
    try:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.PIPE,
            pass_fds=tuple(linked),
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as exc:
        raise StoreError(f"cannot run {TAR}: {exc.strerror}") from exc
    assert process.stderr is not None, "it is a pipe"
    async with process.stderr:
        try:
            words = await with_watcher(partial(_watch, process.pid, meter), partial(_end, process))
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
    _judge(process.returncode, words)


async def _end(process: trio.Process) -> bytes:
    """Wait until the process has ended; returns the first of what it complained about."""
    assert process.stderr is not None, "it is a pipe"
    words = bytearray()
    async for chunk in process.stderr:
        words += chunk[: _WORDS_BYTES - len(words)]
    await process.wait()
    return bytes(words)


def _judge(status: int | None, words: bytes) -> None:
    if status == 0:
        return
    if status == -signal.SIGPIPE:
        cause = "whoever read it has left"
    else:
        cause = words.decode(errors="replace").strip() or f"status {status}"
    raise StoreError(
        f"the tar stream was not finished: {cause}. What was written of it is worth nothing",
        effect=Effect.PARTIAL,
    )


async def _watch(pid: int, meter: Meter) -> None:
    """Tell how much tar has written, by the kernel's count, for as long as it gets on.

    Raises: StoreError: nobody has read the stream for STALL_LIMIT_S.
    """
    reached, since_s = 0, trio.current_time()
    while True:
        await trio.sleep(_LOOK_EVERY_S)
        try:
            counts = await trio.Path(f"/proc/{pid}/io").read_text()
        except OSError:  # it has ended, or the kernel does not tell
            return
        now = next(int(c[7:]) for c in counts.splitlines() if c.startswith("wchar: "))
        if now != reached:
            reached, since_s = now, trio.current_time()
            meter.reached(now)
        elif trio.current_time() > since_s + STALL_LIMIT_S:
            raise StoreError(
                f"nobody has read the tar stream for {STALL_LIMIT_S:g} s", effect=Effect.PARTIAL
            )
