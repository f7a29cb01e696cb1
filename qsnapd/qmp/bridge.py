"""The asyncio island: `qemu.qmp` on trio. No other module imports asyncio.

One event loop per session, so that the end of one QEMU never disturbs another. qsnapd
dials the socket itself, because only a socket of our own can be broken when a wedged
QEMU would keep the loop from ending.
"""

import json
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio_asyncio
from qemu.qmp import EventListener as QmpEventListener
from qemu.qmp import (
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import ConnectError

from qsnapd.errors import (
    CommandRefused,
    Effect,
    MonitorBusy,
    NobodyListens,
    ReplyTimeout,
    SessionLost,
    UnexpectedReply,
    VmError,
)
from qsnapd.qmp.transport import EventListener, QmpEvent
from qsnapd.qmp.words import in_long_words, in_words

GREETING_LIMIT_S = 5.0
"""QEMU greets at once, unless another client holds the monitor."""
FAREWELL_LIMIT_S = 2.0

_log = logging.getLogger(__name__)


class _Tap(QmpEventListener):
    """Forward events at once and keep none: the library's listeners keep them for ever."""

    def __init__(self, bridge: "QmpBridge") -> None:
        super().__init__()
        self._bridge = bridge

    def accept(self, event: Message) -> bool:
        self._bridge._forward(event)
        return False


class _Nonsense(ProtocolError):
    """What came is not QMP. The library's own errors repeat all of it, however long or deep."""


class _Client(QMPClient):
    """The library's client, that spells out messages for the log only if they are logged."""

    async def _do_recv(self) -> Message:
        try:
            message = await super()._do_recv()
            _require_text(message)
            return message
        except (ProtocolError, ValueError, RecursionError) as exc:
            raise _Nonsense(f"a message cannot be read ({type(exc).__name__})") from None

    async def _on_message(self, msg: Message) -> None:
        try:
            await super()._on_message(msg)
        except (ProtocolError, TypeError) as exc:
            raise _Nonsense(f"a message is out of place ({type(exc).__name__})") from None

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


def _require_text(message: Message) -> None:
    """Raise ValueError if a string in *message* is none, but half a character: see RFC 3629.

    JSON can spell that, and nobody could write it to a file or send it on.
    """
    raw = bytes(message)
    if not raw.isascii() or b"\\ud" in raw.lower():
        json.dumps(dict(message), ensure_ascii=False).encode()


class QmpBridge:
    """One connected monitor; a `QmpTransport` that lives as long as `open_bridge`'s block."""

    def __init__(
        self, client: QMPClient, loop: trio_asyncio.TrioEventLoop, sock: socket.socket
    ) -> None:
        self._client = client
        self._loop = loop
        self._sock = sock
        self._closed = False
        self._listeners: list[EventListener] = []
        self._descriptor_lock = trio.Lock()
        client.events.accept = lambda event: False  # type: ignore[method-assign]
        client.register_listener(_Tap(self))

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object],
        *,
        timeout_s: float,
        descriptor: int | None = None,
    ) -> object:
        if descriptor is None:
            return await self._call(name, arguments, timeout_s)
        # The descriptor travels ahead of its command; another one in between would replace it.
        async with self._descriptor_lock:
            self._require_open(name)
            try:
                self._client.send_fd_scm(descriptor)
            except OSError as exc:
                raise SessionLost(f"cannot hand a file to QEMU: {exc.strerror}") from exc
            return await self._call(name, arguments, timeout_s)

    async def _call(self, name: str, arguments: Mapping[str, object], limit_s: float) -> object:
        self._require_open(name)
        # loop= is explicit: the caller's task may have been born outside the island.
        call = trio_asyncio.aio_as_trio(self._client.execute, loop=self._loop)
        try:
            with trio.fail_after(limit_s):
                return await call(name, dict(arguments) or None)
        except trio.TooSlowError:
            raise ReplyTimeout(
                f"QEMU did not answer {name} within {limit_s:g} s", effect=Effect.UNKNOWN
            ) from None
        except ExecuteError as exc:
            error_class, words = in_words(exc.error_class), in_long_words(str(exc))
            raise CommandRefused(name, error_class, words) from exc
        except ExecInterruptedError as exc:
            raise SessionLost(
                f"QEMU closed the monitor during {name}", effect=Effect.UNKNOWN
            ) from exc
        except StateError as exc:
            raise SessionLost(f"the monitor was closed before {name} was sent") from exc
        except QMPError as exc:  # neither a result nor an error
            raise UnexpectedReply(
                f"QEMU's reply to {name} is not understood", effect=Effect.UNKNOWN
            ) from exc

    def _require_open(self, name: str) -> None:
        if self._closed or self._client.runstate != Runstate.RUNNING:
            raise SessionLost(f"the monitor was closed before {name} was sent")

    def listen(self, listener: EventListener) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: EventListener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _forward(self, message: Message) -> None:
        if (event := QmpEvent.of(message)) is None:
            return
        for listener in tuple(self._listeners):
            listener(event)

    async def watch(self) -> None:
        """Raise SessionLost once the connection is no longer up."""
        # Looking and waiting are one step of asyncio's: between two of ours QEMU may have gone.
        await trio_asyncio.aio_as_trio(self._until_it_is_not_up, loop=self._loop)()
        raise SessionLost("QEMU closed the monitor", effect=Effect.UNKNOWN)

    async def _until_it_is_not_up(self) -> None:
        """Runs in asyncio."""
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()

    async def farewell(self) -> None:
        """Disconnect; a QEMU that does not let go has its socket broken."""
        self._closed = True
        disconnect = trio_asyncio.aio_as_trio(self._client.disconnect, loop=self._loop)
        with trio.move_on_after(FAREWELL_LIMIT_S) as patience:
            await _quietly(disconnect)
        if patience.cancelled_caught:
            self._sock.shutdown(socket.SHUT_RDWR)
            await _quietly(disconnect)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception that is not itself a group."""
    inner = group.exceptions[0]
    return _only(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _quietly(disconnect: Any) -> None:  # noqa: ANN401 -- trio_asyncio is untyped
    try:
        await disconnect()
    # Whatever its reader died of, nonsense from the other side included: it is over.
    except Exception as exc:
        _log.debug("monitor went away on its own: %r", exc)


def _told_once(record: logging.LogRecord) -> bool:
    """Drop the library's own account of failures, which are raised as well, and of late replies.

    As many of these may come, and as long ones, as whoever is at the other end likes.
    """
    return record.levelno < logging.WARNING or _log.isEnabledFor(logging.DEBUG)


def _log_stray(loop: object, context: dict[str, Any]) -> None:
    """Keep the loop alive when a future nobody awaits carries QEMU's EOF."""
    _log.debug("stray asyncio outcome: %s (%r)", context.get("message"), context.get("exception"))


def _dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        sock.connect(str(path))
    except BlockingIOError:
        sock.close()
        raise MonitorBusy(
            f"{path}: the monitor's queue of clients is full; QEMU serves one at a time"
        ) from None
    except OSError as exc:
        sock.close()
        gone = isinstance(exc, (FileNotFoundError, ConnectionRefusedError))
        lost = NobodyListens if gone else SessionLost
        raise lost(f"cannot connect to {path}: {exc.strerror or exc}") from exc
    return sock


@asynccontextmanager
async def open_bridge(
    where: Path | socket.socket, *, name: str, greeting_limit_s: float = GREETING_LIMIT_S
) -> AsyncIterator[tuple[QmpBridge, socket.socket]]:
    """Connect to the QMP socket at the path *where* and hold it for the block.

    Or *where* is a socket that QEMU has the other end of; it is closed on exit.

    Yields the bridge and its socket, whose peer credentials tell who QEMU is. If QEMU goes
    away the block is cancelled and SessionLost raised. What the block raises comes out
    bare, never wrapped in a group.

    Raises:
      MonitorBusy: somebody else holds the monitor: QEMU sent no greeting.
      NobodyListens: no QEMU serves that socket.
      SessionLost: the connection could not be made, or ended.
      VmError: whoever answers there does not speak QMP.
    """
    sock = where if isinstance(where, socket.socket) else _dial(where)
    from_block: BaseException | None = None
    finished = False
    try:
        async with trio_asyncio.open_loop() as loop:
            loop.set_exception_handler(_log_stray)
            client = _Client(name)
            client.logger.addFilter(_told_once)
            await _greet(client, loop, sock, where, greeting_limit_s)
            bridge = QmpBridge(client, loop, sock)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(bridge.watch)
                    try:
                        yield bridge, sock
                    except BaseException as exc:
                        from_block = exc
                        raise
                    finished = True
                    nursery.cancel_scope.cancel()
            finally:
                with trio.fail_after(3 * FAREWELL_LIMIT_S, shield=True):
                    await bridge.farewell()
    except BaseExceptionGroup as group:
        gone, rest = group.split((SessionLost, EOFError, OSError, QMPError))
        if finished and rest is None:
            return  # the block's result stands; only the goodbye went wrong
        if from_block is not None and not isinstance(from_block, trio.Cancelled):
            raise from_block from None
        refused = group.subgroup((MonitorBusy, VmError))
        if from_block is None and refused is not None:
            raise _only(refused) from None
        if gone is not None:
            raise SessionLost("QEMU closed the monitor", effect=Effect.UNKNOWN) from group
        raise
    finally:
        sock.close()


async def _greet(
    client: QMPClient,
    loop: trio_asyncio.TrioEventLoop,
    sock: socket.socket,
    where: Path | socket.socket,
    limit_s: float,
) -> None:
    path = where if isinstance(where, Path) else "its own monitor"
    try:
        with trio.fail_after(limit_s):
            await trio_asyncio.aio_as_trio(client.connect, loop=loop)(sock)
    except trio.TooSlowError:
        raise MonitorBusy(
            f"{path}: QEMU sent no greeting within {limit_s:g} s. A monitor serves one "
            "client: give qsnapd one of its own (-qmp unix:PATH,server=on,wait=off), or QEMU hangs"
        ) from None
    except AssertionError as exc:  # the library's: it was up, and is down again already
        with trio.move_on_after(FAREWELL_LIMIT_S, shield=True):
            await _quietly(trio_asyncio.aio_as_trio(client.disconnect, loop=loop))
        raise SessionLost(f"{path}: the connection ended right after QEMU's greeting") from exc
    except ConnectError as exc:
        if isinstance(exc.exc, (OSError, EOFError)):
            raise SessionLost(f"{path}: the connection ended before QEMU's greeting") from exc
        cause = in_words(f"{type(exc.exc).__name__}: {exc.exc}")
        raise VmError(f"{path}: whoever answers there does not speak QMP ({cause})") from exc
