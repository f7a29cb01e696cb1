"""The file that the guest's memory goes to, and its way into QEMU's hands."""

import errno
import fcntl
import logging
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from qsnapd.errors import CaptureFailed
from qsnapd.image.files import reopen
from qsnapd.image.reserve import reserve
from qsnapd.model.plan import CheckpointPlan
from qsnapd.qmp.commands import AddFd, GetFd
from qsnapd.qmp.migration import Migrate
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.room import image_bytes
from qsnapd.snapshot.taking.saving import STANDSTILL_LIMIT_S

CHUNK_BYTES = 1 << 20
QUEUED_CHUNKS = 16
_END = b""

_log = logging.getLogger(__name__)


@dataclass
class MemoryTarget:
    """Where QEMU writes: the file, or a pipe whose reader never fails."""

    plan: CheckpointPlan
    descriptor: int
    """Ours, read-write, for sealing and verifying."""
    drain: "Drain | None" = field(default=None)

    @property
    def name(self) -> str:
        return f"qsnapd-{self.plan.token}"

    @property
    def file(self) -> str:
        """Its final path."""
        assert self.plan.memory_file is not None, "a checkpoint has a place for its memory"
        return self.plan.memory_file

    def reserve(self) -> None:
        """Have room for all that may come. Blocks. Raises: StoreFull, StoreError."""
        if not reserve(self.descriptor, image_bytes(self.plan), self.file):
            _log.info("%s: this file system reserves nothing", self.file)

    async def hand_over(self, session: QmpSession) -> None:
        """Give QEMU its descriptor; before the pause, like everything slow.

        QEMU opens an fdset by access mode and wants exactly O_WRONLY there.
        """
        if self.plan.drained:
            self.drain = Drain(self.descriptor)
            try:
                await session.execute(GetFd(fdname=self.name), descriptor=self.drain.writer)
            finally:
                self.drain.let_go()
            return
        writer = reopen(self.descriptor, os.O_WRONLY)
        try:
            if self.plan.memory_fdset_id is None:
                await session.execute(GetFd(fdname=self.name), descriptor=writer)
            else:
                await session.execute(
                    AddFd(fdset_id=self.plan.memory_fdset_id, opaque=self.file),
                    descriptor=writer,
                )
        finally:
            os.close(writer)

    def command(self) -> Migrate:
        if self.plan.memory_fdset_id is None or self.plan.drained:
            return Migrate(uri=f"fd:{self.name}")
        return Migrate(uri=f"file:/dev/fdset/{self.plan.memory_fdset_id}")


class Drain:
    """Copies a pipe to a file, and goes on reading when the file can take no more, or stalls.

    QEMU < 10.0 freezes its guest when a background snapshot fails, so it must never see
    a failure: the snapshot fails here instead.
    """

    def __init__(self, target: int) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):  # this user has too many large pipes; only slower without
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        self._target = os.dup(target)
        self._chunks = queue.Queue[bytes](QUEUED_CHUNKS)
        self._failure: OSError | None = None
        self._reading = threading.Thread(target=self._read, name="drain", daemon=True)
        self._writing = threading.Thread(target=self._write, name="drain-to", daemon=True)
        self._reading.start()
        self._writing.start()

    def let_go(self) -> None:
        """Close our end for writing: QEMU's is the only one left."""
        os.close(self.writer)

    def _read(self) -> None:
        try:
            while chunk := os.read(self._reader, CHUNK_BYTES):
                self._pass_on(chunk)
            self._pass_on(_END)
        finally:
            os.close(self._reader)

    def _pass_on(self, chunk: bytes) -> None:
        if self._failure is not None:
            return
        try:
            self._chunks.put(chunk, timeout=STANDSTILL_LIMIT_S)
        except queue.Full:
            self._failure = OSError(errno.ETIMEDOUT, "the disk stalls")

    def _write(self) -> None:
        try:
            while (chunk := self._chunks.get()) and self._failure is None:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._target, view) :]
        except OSError as exc:
            self._failure = exc
            with suppress(queue.Empty):  # the reader may be waiting for room
                while True:
                    self._chunks.get_nowait()
        finally:
            os.close(self._target)

    def finish(self) -> None:
        """Wait until QEMU's last byte is in the file. Blocks: call it in a thread.

        Raises: CaptureFailed: the file could not take it all.
        """
        self._reading.join()
        if self._failure is None:
            self._writing.join()
        if self._failure is not None:
            raise CaptureFailed(f"the memory image could not be written: {self._failure.strerror}")
