"""A guest agent on a socket, that does what a real one will not do on demand."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"
STATUS = "guest-fsfreeze-status"
SYNC = "guest-sync-delimited"


class FakeAgent:
    """One client at a time, one command after the other, like the real one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filesystems = 2
        self.frozen = 0
        self.done: list[str] = []
        """What it was asked and has done, syncs left out."""
        self.deaf = trio.Event()
        """Not set: it reads nothing."""
        self.deaf.set()
        self.mute = set[str]()
        """Done, but not answered."""
        self.hangs_up = set[str]()
        """Done, and then the connection is closed, once each."""
        self.takes_s: dict[str, float] = {}
        self.refuses: dict[str, str] = {}
        self.says: dict[str, bytes] = {}
        """Instead of an answer."""
        self.stale = b""
        """Lies in the line in front of the next answer."""
        self.clients = 0

    async def serve(
        self, listener: trio.SocketListener, task_status: trio.TaskStatus[None]
    ) -> None:
        task_status.started()
        while True:
            stream = await listener.accept()
            self.clients += 1
            async with stream:
                with suppress(trio.BrokenResourceError):
                    await self._converse(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        buffer = b""
        while True:
            while b"\n" not in buffer:
                await self.deaf.wait()
                received = await stream.receive_some()
                if not received:
                    return
                buffer += received
            line, buffer = buffer.split(b"\n", 1)
            await self.deaf.wait()
            request = json.loads(line.rpartition(b"\xff")[2])
            name = request["execute"]
            await trio.sleep(self.takes_s.pop(name, 0))
            answer = self._do(name, request.get("arguments", {}))
            if name in self.hangs_up:
                self.hangs_up.discard(name)
                return
            if name in self.mute:
                continue
            said = self.says.get(name) or json.dumps(answer).encode() + b"\n"
            mark = b"\xff" if name == SYNC else b""
            stale, self.stale = self.stale, b""
            await stream.send_all(stale + mark + said)

    def _do(self, name: str, arguments: dict[str, object]) -> dict[str, object]:
        if name == SYNC:
            return {"return": arguments["id"]}
        self.done.append(name)
        if name in self.refuses:
            return {"error": {"class": "GenericError", "desc": self.refuses[name]}}
        match name:
            case "guest-fsfreeze-freeze":
                self.frozen = self.filesystems
                return {"return": self.frozen}
            case "guest-fsfreeze-freeze-list":
                mountpoints = arguments["mountpoints"]
                assert isinstance(mountpoints, list)
                self.frozen = len(mountpoints)
                return {"return": self.frozen}
            case "guest-fsfreeze-thaw":
                thawed, self.frozen = self.frozen, 0
                return {"return": thawed}
            case "guest-fsfreeze-status":
                return {"return": "frozen" if self.frozen else "thawed"}
        return {"error": {"class": "CommandNotFound", "desc": f"no {name} here"}}


@asynccontextmanager
async def open_agent(path: Path) -> AsyncIterator[FakeAgent]:
    """Serve an agent at *path* for the block."""
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen(1)  # as QEMU does it
    agent = FakeAgent(path)
    async with trio.SocketListener(sock) as listener, trio.open_nursery() as nursery:
        await nursery.start(agent.serve, listener)
        yield agent
        nursery.cancel_scope.cancel()
