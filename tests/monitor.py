"""A QMP client of our own for tests, to look at a VM past qsnapd."""

import json
from typing import Any

import trio

REPLY_LIMIT_S = 20.0


class QmpError(Exception):
    """QEMU refused a command."""


class Monitor:
    """A QMP client of a few lines: one command at a time, events kept in the order they came."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    async def greet(self) -> None:
        with trio.fail_after(REPLY_LIMIT_S):
            assert "QMP" in await self._read()
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401
        """Run *command* and return what QEMU returns; underscores in names stand for dashes.

        Raises:
          QmpError: QEMU refused.
          TooSlowError: no reply in time.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": named}
        with trio.fail_after(REPLY_LIMIT_S):
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
            while "event" in (message := await self._read()):
                self.events.append(message)
        if "error" in message:
            raise QmpError(f"{command}: {message['error']['desc']}")
        return message["return"]

    async def wait_event(self, name: str, *, limit_s: float = 60.0) -> dict[str, Any]:
        """Return the first event called *name* since the last one that was returned."""
        with trio.fail_after(limit_s):
            while True:
                while self.events:
                    event = self.events.pop(0)
                    if event["event"] == name:
                        return event
                self.events.append(await self._read())

    async def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            received = await self._stream.receive_some()
            if not received:
                raise EOFError("QEMU closed the monitor")
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
