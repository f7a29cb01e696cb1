"""Varlink's framing: JSON objects, each ended by a NUL byte, on a stream.

No peer can make this side wait without a deadline or buffer without a bound.
"""

import array
import json
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Self

import trio

from qsnapd.errors import ControlError

MAX_REQUEST_BYTES = 1 << 20
"""For a whole manifest, which only root has reason to send."""
MAX_SMALL_REQUEST_BYTES = 64 << 10
"""For everything else; to parse one takes some milliseconds, in which nobody else is served."""
IDLE_LIMIT_S = 300.0
"""How long a connection may rest between two requests."""
MESSAGE_LIMIT_S = 10.0
"""How long one message may take from its first byte to its NUL, in either direction."""
_CHUNK_BYTES = 64 << 10
_DESCRIPTOR = array.array("i", [0])
_ANCILLARY_BYTES = socket.CMSG_LEN(_DESCRIPTOR.itemsize)
"""Room for one descriptor: the kernel closes those that do not fit."""

Message = dict[str, object]


class PeerGone(Exception):
    """The other side has left, or no longer reads. Never leaves `qsnapd.control`."""


class Wire:
    """One connection's messages. One task reads, one writes.

    A descriptor may come along with a message (SCM_RIGHTS). At most one is held at a time,
    until it is taken or the block ends; all others are closed as they arrive.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        idle_limit_s: float = IDLE_LIMIT_S,
        message_limit_s: float = MESSAGE_LIMIT_S,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        takes_descriptors: bool = False,
    ) -> None:
        """*takes_descriptors*: from somebody trusted. To close one may take as long as its
        file system likes; those that are not taken, the kernel drops without that."""
        self._stream = stream
        self._max_request_bytes = max_request_bytes
        self._ancillary_bytes = _ANCILLARY_BYTES if takes_descriptors else 0
        self._idle_limit_s = idle_limit_s
        self._message_limit_s = message_limit_s
        self._buffer = bytearray()
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the descriptor that nobody took. The stream is the caller's."""
        if (descriptor := self.take_descriptor()) is not None:
            os.close(descriptor)

    def take_descriptor(self) -> int | None:
        """Return the descriptor that has arrived, now the caller's to close; None if none has."""
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    async def receive(self) -> bytes | None:
        """Return the next message, unparsed; None if the peer left or rests for too long.

        Raises:
          ControlError: it is too long, too slow or cut off. Close the stream: where the
            next one begins is not known.
          PeerGone: the connection broke.
        """
        await trio.lowlevel.checkpoint()  # a heap of requests must not keep others waiting
        if not self._buffer:
            with trio.move_on_after(self._idle_limit_s):
                await self._fill()
            if not self._buffer:
                return None
        with trio.move_on_after(self._message_limit_s):
            return await self._frame()
        raise ControlError(f"the request was not complete after {self._message_limit_s:g} s")

    async def send(self, message: Message | bytes) -> None:
        """Send one message; bytes are one that is JSON already.

        On failure or cancellation: part of it may have been sent; close the stream.
        Raises: PeerGone: the connection broke, or the peer did not read for too long.
        """
        if not isinstance(message, bytes):
            message = json.dumps(message, separators=(",", ":")).encode()
        frame = message + b"\0"
        try:
            with trio.fail_after(self._message_limit_s):
                await self._stream.send_all(frame)
        except (trio.TooSlowError, trio.BrokenResourceError) as exc:
            raise PeerGone from exc

    async def wait_closed(self) -> None:
        """Return when the peer has closed its side, or sends more than we care to keep."""
        while len(self._buffer) <= self._max_request_bytes:
            try:
                if not await self._fill():
                    return
            except PeerGone:
                return

    async def _frame(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(0, searched)) < 0:
            searched = len(self._buffer)
            if searched > self._max_request_bytes:
                break
            if not await self._fill():
                raise ControlError("the connection ended in the middle of a request")
        if end < 0 or end > self._max_request_bytes:
            raise ControlError(f"a request must not be longer than {self._max_request_bytes} bytes")
        frame = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return frame

    async def _fill(self) -> bool:
        try:
            chunk = await self._read()
        except (trio.BrokenResourceError, OSError) as exc:
            raise PeerGone from exc
        self._buffer += chunk
        return bool(chunk)

    async def _read(self) -> bytes | bytearray:
        if not isinstance(self._stream, trio.SocketStream):
            return await self._stream.receive_some(_CHUNK_BYTES)
        chunk, ancillary, _, _ = await self._stream.socket.recvmsg(
            _CHUNK_BYTES, self._ancillary_bytes, socket.MSG_CMSG_CLOEXEC
        )
        for descriptor in _descriptors(ancillary):
            if self._descriptor is None:
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        return chunk


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            size = _DESCRIPTOR.itemsize
            yield from array.array("i", data[: len(data) - len(data) % size])
