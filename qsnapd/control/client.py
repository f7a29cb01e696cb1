"""A small synchronous client of the control socket, for the command line and for scripts.

It imports neither trio nor pydantic: `qsnapctl` has to start in a moment.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Self

from qsnapd import errors
from qsnapd.errors import ControlError, Effect, QsnapError

INTERFACE = "io.qsnapd"
REPLY_LIMIT_S = 30.0
"""How long one query may take."""
_MAX_REPLY_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10

Reply = dict[str, Any]
"""The parameters of one reply; the interface text says what they hold."""


class Client:
    """One connection to the daemon; a context manager.

    One call at a time. A call that raised ControlError, and a stream that was not read to
    its end, leave the connection unusable.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, reply_limit_s: float = REPLY_LIMIT_S
    ) -> None:
        """Connect. Raises: ControlError: nobody answers at *path*, or we may not ask."""
        self._path = os.fspath(path)
        self._reply_limit_s = reply_limit_s
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not a timeout of Python's: it makes a queue of clients that is full an error at once.
        limit = struct.pack("@ll", int(reply_limit_s), int(reply_limit_s % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self._socket.connect(self._path)
        except OSError as exc:
            self._socket.close()
            raise ControlError(f"cannot reach qsnapd: {_why(self._path, exc)}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: str, **parameters: object) -> Reply:
        """Call *method* and return its only reply. None as a parameter means the default.

        Raises:
          QsnapError: of the class, with the message and effect, that the daemon gave.
          ControlError: the daemon left, or did not answer within the limit.
        """
        self._socket.settimeout(self._reply_limit_s)
        self._send({"method": f"{INTERFACE}.{method}", "parameters": parameters})
        try:
            return _parameters(self._receive())
        except TimeoutError as exc:
            raise ControlError(
                f"qsnapd did not answer within {self._reply_limit_s:g} s", effect=Effect.UNKNOWN
            ) from exc

    def stream(
        self,
        method: str,
        *,
        limit_s: float | None = None,
        descriptor: int | None = None,
        **parameters: object,
    ) -> Iterator[Reply]:
        """Call *method* for many replies and yield each as it arrives.

        Without *limit_s* the next reply may take for ever: the daemon bounds its jobs.
        *descriptor* is sent along, for the methods that say they want one; it stays open here.
        Raises:
          as `call`, at the reply that says so.
          TimeoutError: the last reply was not there after *limit_s* seconds in all.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        request = {"method": f"{INTERFACE}.{method}", "parameters": parameters, "more": True}
        self._send(request, descriptor)
        continues = True
        while continues:
            if deadline is not None:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            else:
                self._socket.settimeout(None)
            message = self._receive()
            continues = message.get("continues") is True
            yield _parameters(message)

    def _send(self, request: dict[str, object], descriptor: int | None = None) -> None:
        frame = json.dumps(request).encode() + b"\0"
        try:
            if descriptor is not None:  # it travels with the first byte
                sent = socket.send_fds(self._socket, [frame], [descriptor])
                frame = frame[sent:]
            self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have said why: that is read next
        except OSError as exc:
            raise ControlError(f"qsnapd closed the connection: {exc.strerror}") from exc

    def _receive(self) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(0, searched)) < 0:
            searched = len(self._buffer)
            if searched > _MAX_REPLY_BYTES:
                raise ControlError("qsnapd sent a reply without end")
            self._buffer += self._chunk()
        frame = self._buffer[:end]
        del self._buffer[: end + 1]
        try:
            message = json.loads(frame)
        except ValueError as exc:
            raise ControlError(f"{self._path} does not speak Varlink") from exc
        if not isinstance(message, dict):
            raise ControlError(f"{self._path} does not speak Varlink")
        return message

    def _chunk(self) -> bytes:
        try:
            chunk = self._socket.recv(_CHUNK_BYTES)
        except TimeoutError:
            raise
        except OSError as exc:
            raise ControlError(f"lost the connection to qsnapd: {exc.strerror}") from exc
        if not chunk:
            raise ControlError(
                "qsnapd closed the connection before it answered", effect=Effect.UNKNOWN
            )
        return chunk


def _parameters(message: dict[str, Any]) -> Reply:
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ControlError("qsnapd sent a reply that is not Varlink")
    if (name := message.get("error")) is not None:
        raise _rebuilt(str(name), parameters)
    return parameters


def _rebuilt(name: str, parameters: dict[str, Any]) -> QsnapError:
    """Turn an error reply into the exception that the daemon raised."""
    interface, _, member = name.rpartition(".")
    known = getattr(errors, member, None) if interface == INTERFACE else None
    if not (isinstance(known, type) and issubclass(known, QsnapError)):
        detail = ", ".join(f"{key}: {value}" for key, value in parameters.items())
        return ControlError(f"qsnapd answered {name} ({detail})")
    said = {key: value for key, value in parameters.items() if key != "code"}
    error = known.__new__(known)  # its own __init__ would build the message anew
    effect = Effect(said.pop("effect", Effect.UNKNOWN))
    QsnapError.__init__(error, said.pop("message", name), effect=effect)
    vars(error).update(said)
    return error


def _why(path: str, exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
        return f"no daemon listens at {path}"
    if isinstance(exc, PermissionError):
        return f"no permission to connect to {path}"
    if isinstance(exc, BlockingIOError):
        return f"{path}: too many clients are waiting to be let in"
    return f"{path}: {exc.strerror or exc}"
