"""`qsnapd` and `qsnapctl` as their users have them: processes, files, sockets."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import trio

from tests.harness import Agent, Vm

COMMANDS = Path(sys.executable).parent
READY_LIMIT_S = 30.0
ANSWER_LIMIT_S = 120.0
ATTACH_LIMIT_S = 20.0


class Daemon:
    """A daemon that said READY=1, while `open_daemon` holds it."""

    def __init__(self, config: Path, control: Path, process: trio.Process) -> None:
        self.config = config
        self.control = control
        self.process = process

    def command(self, line: str) -> list[str]:
        return [str(COMMANDS / "qsnapctl"), "--socket", str(self.control), *line.split()]

    async def ctl(self, line: str, status: int = 0) -> str:
        """Run `qsnapctl LINE`; return its stdout, or its stderr if *status* is not 0."""
        with trio.fail_after(ANSWER_LIMIT_S):
            done = await trio.run_process(
                self.command(line), capture_stdout=True, capture_stderr=True, check=False
            )
        assert done.returncode == status, f"qsnapctl {line}: {done.stderr.decode()}"
        return (done.stderr if status else done.stdout).decode()

    async def json(self, line: str, status: int = 0) -> Any:  # noqa: ANN401
        return json.loads(await self.ctl(f"--json {line}", status))

    async def wait_attached(self, vm: str) -> None:
        """Wait until the daemon has found *vm*: a moment after it is ready."""
        with trio.fail_after(ATTACH_LIMIT_S):
            while not (await self.json(f"dominfo {vm}"))["connected"]:
                pass  # each question takes a moment

    async def watch(self, *, until: str, begun: trio.Event) -> list[str]:
        """Note what happens until the event called *until*; set *begun* when none is missed.

        Returns events as "Suspended", and each state the VM was seen in between as
        "paused (creating snapshot)".
        """
        seen: list[str] = []
        async with (
            await trio.open_unix_socket(self.control) as listening,
            await trio.open_unix_socket(self.control) as asking,
        ):
            await _send(listening, "Subscribe", more=True)
            async with trio.open_nursery() as nursery:

                async def ask_again_and_again() -> None:
                    async with aclosing(_replies(asking)) as replies:
                        while True:
                            await _send(asking, "GetVm", vm="vm1")
                            vm = (await anext(replies))["vm"]
                            seen.append(f"{vm['state']} ({vm['reason']})")

                nursery.start_soon(ask_again_and_again)
                async with aclosing(_replies(listening)) as replies:
                    async for reply in replies:
                        begun.set()
                        if event := reply["event"]:
                            seen.append(event["event"])
                            if event["event"] == until:
                                break
                nursery.cancel_scope.cancel()
        return seen


async def _send(stream: trio.SocketStream, method: str, *, more: bool = False, **to: str) -> None:
    call = {"method": f"io.qsnapd.{method}", "parameters": to, "more": more}
    await stream.send_all(json.dumps(call).encode() + b"\0")


async def _replies(stream: trio.SocketStream) -> AsyncGenerator[dict[str, Any], None]:
    buffer = b""
    while chunk := await stream.receive_some():
        *frames, buffer = (buffer + chunk).split(b"\0")
        for frame in frames:
            yield json.loads(frame)["parameters"]


@asynccontextmanager
async def open_daemon(
    folder: Path,
    vms: Mapping[str, Vm],
    qemu_img: Path,
    *,
    log: IO[bytes] | None = None,
    settings: Sequence[str] = (),
    umask: int = -1,
) -> AsyncIterator[Daemon]:
    """Run `qsnapd serve` on *vms* for the block; its state stays below *folder*.

    *settings*: more lines for its section of the configuration. What it logs goes to *log*, by
    default to our own stderr; its *umask* is ours by default.

    On exit: it was told to end, and did so in time.
    """
    control, config = folder / "io.qsnapd", folder / "qsnapd.toml"
    lines = [
        "[daemon]",
        f'socket = "{control}"',
        f'state_dir = "{folder}/state"',
        f'runtime_dir = "{folder}"',
        f'qemu_img = "{qemu_img}"',
        *settings,
    ]
    for name, vm in vms.items():
        lines += [f"[vm.{name}]", f'qmp = "{vm.qmp}"']
        if isinstance(vm.guest, Agent):
            lines.append(f'agent = "{vm.agent}"')
    config.write_text("\n".join(lines))
    argv = [str(COMMANDS / "qsnapd"), "serve", "--config", str(config)]
    notify = folder / "notify"
    notify.unlink(missing_ok=True)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        await ready.bind(str(notify))
        async with trio.open_nursery() as nursery:
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify)}
            options = {"stderr": log, "env": environment, "umask": umask, "check": False}
            start = partial(trio.run_process, argv, **options)
            process: trio.Process = await nursery.start(start)
            with trio.fail_after(READY_LIMIT_S):
                assert await ready.recv(100) == b"READY=1"
            yield Daemon(config, control, process)
            process.terminate()
            with trio.fail_after(READY_LIMIT_S):
                await process.wait()


async def reconcile(daemon: Daemon) -> subprocess.CompletedProcess[bytes]:
    """What systemd runs after the daemon has ended, however it ended."""
    argv = [str(COMMANDS / "qsnapd"), "reconcile", "--resume-only", "--config", str(daemon.config)]
    with trio.fail_after(ANSWER_LIMIT_S):
        return await trio.run_process(argv)
