"""Real daemons, one after the other, in a fraction of the time that Python starts in."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qsnapd.control.client import Client
from qsnapd.threads import FILE_LIMIT_S
from tests.parts import ROOT

READY_LIMIT_S = 30.0
END_LIMIT_S = 60.0
ANSWER_LIMIT_S = 120.0


class Forged:
    """One daemon, until it ends."""

    def __init__(self, pid: int, control: Path) -> None:
        self.pid = pid
        self.control = control
        self._pidfd = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        """Nothing if it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def ended(self) -> None:
        """Wait until it has; the caller has a deadline."""
        await trio.lowlevel.wait_readable(self._pidfd)

    async def end(self) -> None:
        """Tell it to end, and wait; a daemon that hangs is killed."""
        self.signal(signal.SIGTERM)
        with trio.move_on_after(END_LIMIT_S):
            await self.ended()
            return
        self.signal(signal.SIGKILL)
        await self.ended()
        raise AssertionError(f"the daemon did not end within {END_LIMIT_S:g} s of SIGTERM")

    def close(self) -> None:
        os.close(self._pidfd)

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call it and return its reply. Raises: QsnapError: its answer, or that it is gone."""
        return await trio.to_thread.run_sync(
            partial(self._call, method, parameters), abandon_on_cancel=True
        )

    def _call(self, method: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        with Client(self.control, reply_limit_s=ANSWER_LIMIT_S) as client:
            return client.call(method, **parameters)


class Forge:
    """Makes daemons; see `open_forge`."""

    def __init__(self, orders: trio.socket.SocketType) -> None:
        self._orders = orders
        self._turn = trio.Lock()

    @asynccontextmanager
    async def daemon(
        self,
        config: Path,
        control: Path,
        log: Path,
        environment: Mapping[str, str],
        *,
        file_limit_s: float = FILE_LIMIT_S,
        reply_limit_s: float | None = None,
        garbling: Mapping[str, object] | None = None,
    ) -> AsyncIterator[Forged]:
        """Run `qsnapd serve` for the block; it is ready. On exit it was killed, if it still ran.

        *reply_limit_s*: it waits no longer for any reply of QEMU's. *garbling*: what becomes of
        those, and of events; see `tests.attacks.garbling`.
        """
        address = f"@qsnapd-forge-{os.getpid()}-{os.urandom(4).hex()}"
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            await ready.bind("\0" + address[1:])
            order = {
                "words": ["serve"],
                "config": str(config),
                "log": str(log),
                "file_limit_s": file_limit_s,
                "reply_limit_s": reply_limit_s,
                "garbling": dict(garbling or {}),
                "environment": {**environment, "NOTIFY_SOCKET": address},
            }
            async with self._turn:
                await self._orders.send(json.dumps(order).encode())
                pid = int(await self._orders.recv(64))
            daemon = Forged(pid, control)
            try:
                with trio.fail_after(READY_LIMIT_S):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_fail_at_its_end, daemon, log)
                        assert await ready.recv(100) == b"READY=1"
                        nursery.cancel_scope.cancel()
                yield daemon
            finally:
                with trio.fail_after(END_LIMIT_S, shield=True):
                    daemon.signal(signal.SIGKILL)
                    await daemon.ended()
                daemon.close()


async def _fail_at_its_end(daemon: Forged, log: Path) -> None:
    await daemon.ended()
    words = await trio.Path(log).read_text()
    raise AssertionError(f"the daemon did not start:\n{words[-2000:]}")


@asynccontextmanager
async def open_forge() -> AsyncIterator[Forge]:
    """Have a forge for the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.attacks.zygote"]
    with trio.socket.from_stdlib_socket(ours) as orders:
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, stdin=theirs, cwd=ROOT, check=False)
            process: subprocess.Popen[bytes] = await nursery.start(run)
            theirs.close()
            yield Forge(orders)
            process.terminate()
