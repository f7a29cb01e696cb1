"""The guest agent of one VM: JSON lines on a unix socket of QEMU's, written by the guest.

The invariant: whatever the guest sends, it costs a bounded amount of memory and time, and what
comes of it is a parsed reply or one of ours among the errors. One user at a time, because the
agent works through its commands one by one and does not say which one it answers.
"""

import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from qsnapd.errors import (
    AgentAbsent,
    AgentRefused,
    AgentSilent,
    AgentUnresponsive,
    Effect,
    VmBusy,
)
from qsnapd.qmp.words import in_words

SYNC_LIMIT_S = 5.0
"""An idle agent answers at once, one that is at work with something else when it is done."""
TURN_LIMIT_S = 10.0
LINE_LIMIT_BYTES = 1 << 20
"""What one reply may be long; the longest is the list of file systems."""
STALE_LIMIT_BYTES = 8 << 20
"""What may lie in front of the answer to a sync: replies that nobody has waited for."""
SENTINEL = b"\xff"
"""Never part of JSON: makes the agent's parser begin anew, and marks where its answer begins."""

ReplyT = TypeVar("ReplyT")


class GuestAgent:
    """The agent behind one socket; the same object for all that use it, since one at a time may."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = trio.Lock()

    @property
    def is_in_use(self) -> bool:
        return self._turn.locked()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep all others of this daemon from the agent during the block.

        Raises: VmBusy: somebody else has it, and for too long.
        """
        with trio.move_on_after(TURN_LIMIT_S) as patience:
            await self._turn.acquire()
        if patience.cancelled_caught:
            raise VmBusy(f"the guest agent at {self.path} is in use for something else right now")
        try:
            yield
        finally:
            self._turn.release()

    async def connect(self) -> "AgentSession":
        """Connect to an agent that answers; the caller is `alone` with it, and closes the session.

        On success: what was left over of earlier conversations is gone.
        On failure or cancellation: nothing was asked of the agent.
        Raises: AgentAbsent: nobody serves the socket. AgentUnresponsive: no answer in time.
        """
        session = AgentSession(self.path, _dial(self.path))
        try:
            await session.sync()
        except BaseException:
            session.close()
            raise
        return session


class AgentSession:
    """A conversation with the agent; over with the first reply that does not come."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self._path = path
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._buffer = bytearray()
        self.is_in_step = True
        """Whether the next answer is that to the next question: no answer is outstanding."""

    def close(self) -> None:
        self.is_in_step = False
        self._stream.socket.close()

    async def sync(self) -> None:
        """Return when the agent has answered to a word that only this session knows.

        Raises: AgentUnresponsive.
        """
        # 53 bits are what any JSON parser keeps
        word = secrets.randbelow(1 << 53)
        request = _request("guest-sync-delimited", {"id": word})
        problem = f"it did not answer within {SYNC_LIMIT_S:g} s"
        try:
            with trio.fail_after(SYNC_LIMIT_S):
                await self._stream.send_all(SENTINEL + request)
                await self._until_answered(word)
            return
        except trio.TooSlowError:
            pass
        except _Nonsense as exc:
            problem = str(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            problem = "the connection broke"
        raise AgentUnresponsive(
            f"the guest agent at {self._path} does not answer ({problem}): look whether "
            "qemu-guest-agent runs in the guest, and whether somebody else is connected to that "
            "socket, as QEMU serves one client at a time; nothing was asked of the guest"
        )

    async def _until_answered(self, word: int) -> None:
        read_bytes = 0
        while True:
            line = await self._line()
            read_bytes += len(line)
            if read_bytes > STALE_LIMIT_BYTES:
                raise _Nonsense("it sends a great deal, but no answer")
            _, sentinel, answer = line.rpartition(SENTINEL)
            if sentinel and _parsed(answer) == {"return": word}:
                return

    async def execute(
        self,
        name: str,
        parse: Callable[[object], ReplyT],
        *,
        limit_s: float,
        arguments: dict[str, object] | None = None,
    ) -> ReplyT:
        """Send a command and return what *parse* makes of the agent's answer.

        *parse* raises ValueError if it makes nothing of it.
        Cancellation: abandons the answer, and this session; the agent goes on.
        Raises: AgentRefused. AgentSilent: no answer that makes sense within *limit_s*; the agent
          may have done it, or may do it yet.
        """
        if not self.is_in_step:
            raise AgentSilent(f"{name} was not sent: the agent's last answer never came")
        self.is_in_step = False
        try:
            with trio.fail_after(limit_s):
                await self._stream.send_all(_request(name, arguments))
                answer = _parsed(await self._line())
            result = _result(name, answer, parse)
        except trio.TooSlowError:
            problem = f"did not answer {name} within {limit_s:g} s"
        except _Nonsense as exc:
            problem = f"has answered {name} with nonsense: {exc}"
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            problem = f"has gone away during {name}"
        except AgentRefused:
            self.is_in_step = True
            raise
        else:
            self.is_in_step = True
            return result
        raise AgentSilent(f"the guest agent at {self._path} {problem}", effect=Effect.UNKNOWN)

    async def _line(self) -> bytes:
        """Read the next line, without its end. Raises: _Nonsense."""
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return line
            searched = len(self._buffer)
            if searched > LINE_LIMIT_BYTES:
                raise _Nonsense(f"a line of more than {LINE_LIMIT_BYTES} bytes")
            received = await self._stream.receive_some(65536)
            if not received:
                raise _Nonsense("the connection was closed")
            self._buffer += received


class _Nonsense(Exception):
    """What came is no answer, and no more will come that could be trusted."""


def _dial(path: Path) -> socket.socket:
    """Connect without waiting. Raises: AgentAbsent, AgentUnresponsive."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        sock.connect(str(path))
    except BlockingIOError:
        sock.close()
        raise AgentUnresponsive(
            f"the queue of clients at the guest agent's socket {path} is full: QEMU serves one at "
            "a time; nothing was asked of the guest"
        ) from None
    except OSError as exc:
        sock.close()
        raise AgentAbsent(
            f"no guest agent can be reached at {path}: {exc.strerror}; look at QEMU's -chardev "
            "and the VM's agent in the configuration"
        ) from exc
    return sock


def _request(name: str, arguments: dict[str, object] | None) -> bytes:
    request = {"execute": name} | ({"arguments": arguments} if arguments else {})
    return json.dumps(request).encode() + b"\n"


def _parsed(line: bytes) -> Any:  # noqa: ANN401 -- whatever the guest has sent
    """The JSON in *line*; None if there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _result(name: str, answer: object, parse: Callable[[object], ReplyT]) -> ReplyT:
    """Raises: AgentRefused; _Nonsense."""
    match answer:
        case {"return": returned}:
            try:
                return parse(returned)
            except (ValueError, RecursionError) as exc:
                raise _Nonsense(f"not what {name} returns ({type(exc).__name__})") from None
        case {"error": {"desc": str(desc)}}:
            raise AgentRefused(f"the guest agent refused {name}: {in_words(desc)}")
    raise _Nonsense("neither a result nor an error")
