"""Varlink's framing: JSON objects, each ended by a NUL byte, on a stream.

No peer can make this side wait without a deadline or buffer without a bound.
"""

import json

import trio

from qsnapd.errors import ControlError

MAX_REQUEST_BYTES = 1 << 20
IDLE_LIMIT_S = 300.0
"""How long a connection may rest between two requests."""
MESSAGE_LIMIT_S = 10.0
"""How long one message may take from its first byte to its NUL, in either direction."""
_CHUNK_BYTES = 64 << 10

Message = dict[str, object]


class PeerGone(Exception):
    """The other side has left, or no longer reads. Never leaves `qsnapd.control`."""


class Wire:
    """One connection's messages. One task reads, one writes."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        idle_limit_s: float = IDLE_LIMIT_S,
        message_limit_s: float = MESSAGE_LIMIT_S,
    ) -> None:
        self._stream = stream
        self._idle_limit_s = idle_limit_s
        self._message_limit_s = message_limit_s
        self._buffer = bytearray()

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

    async def send(self, message: Message) -> None:
        """Send one message.

        On failure or cancellation: part of it may have been sent; close the stream.
        Raises: PeerGone: the connection broke, or the peer did not read for too long.
        """
        frame = json.dumps(message, separators=(",", ":")).encode() + b"\0"
        try:
            with trio.fail_after(self._message_limit_s):
                await self._stream.send_all(frame)
        except (trio.TooSlowError, trio.BrokenResourceError) as exc:
            raise PeerGone from exc

    async def wait_closed(self) -> None:
        """Return when the peer has closed its side, or sends more than we care to keep."""
        while len(self._buffer) <= MAX_REQUEST_BYTES:
            try:
                if not await self._fill():
                    return
            except PeerGone:
                return

    async def _frame(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(0, searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_REQUEST_BYTES:
                break
            if not await self._fill():
                raise ControlError("the connection ended in the middle of a request")
        if end < 0 or end > MAX_REQUEST_BYTES:
            raise ControlError(f"a request must not be longer than {MAX_REQUEST_BYTES} bytes")
        frame = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return frame

    async def _fill(self) -> bool:
        try:
            chunk = await self._stream.receive_some(_CHUNK_BYTES)
        except trio.BrokenResourceError as exc:
            raise PeerGone from exc
        self._buffer += chunk
        return bool(chunk)
