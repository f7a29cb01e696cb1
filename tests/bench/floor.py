"""The floor: what a background checkpoint's pause costs if a bare script sends the commands.

Everything that can be prepared is: overlays, descriptors, capabilities, disks flushed. Then
the fewest commands that give one instant of memory and disks, over a plain blocking socket.
Nothing checks, journals or undoes; it is a measure, not a tool. It shares no code with qsnapd.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

ANSWER_LIMIT_S = 300.0
"""For replies and awaited events; the longest is the end of a save."""
FIRST_FDSET = 1000
CAPABILITIES = ("background-snapshot", "mapped-ram", "events")


class BareMonitor:
    """A QMP client of a few blocking lines, which also keeps the time of every event."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_LIMIT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._events: list[tuple[str, float]] = []
        self._read()  # the greeting
        self.send("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(
        self, command: str, arguments: Mapping[str, object] | None = None, fd: int | None = None
    ) -> Any:  # noqa: ANN401
        """Run *command*, handing *fd* along, and return what QEMU returns."""
        request = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
        if fd is None:
            self._socket.sendall(request)
        else:
            socket.send_fds(self._socket, [request], [fd])
        while "event" in (message := self._read()):
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{command}: {message['error']['desc']}")
        return message["return"]

    def wait_event(self, name: str) -> None:
        """Wait for the next event called *name*."""
        seen = ""
        while seen != name:
            message = self._read()
            self._note(message)
            seen = message["event"]

    def _note(self, event: Mapping[str, Any]) -> None:
        stamp = event["timestamp"]
        self._events.append((event["event"], stamp["seconds"] + stamp["microseconds"] / 1e6))

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise EOFError("QEMU closed the monitor")
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def pause(self) -> Iterator["Pause"]:
        """Time the guest's standing still during the block, by QEMU's own clock."""
        self.send("query-status")  # reads what happened before
        self._events.clear()
        pause = Pause()
        yield pause
        self.send("query-status")  # QEMU sends an event before it answers what comes after
        stops = [at_s for name, at_s in self._events if name == "STOP"]
        resumes = [at_s for name, at_s in self._events if name == "RESUME"]
        pause.ms = round((resumes[-1] - stops[0]) * 1000, 3)


class Pause:
    """How long a guest stood still; known once its block has ended."""

    ms: float


@dataclass(frozen=True)
class Disk:
    """A disk of the VM as it is now."""

    node: str
    path: Path
    format: str
    size_bytes: int


class Floor:
    """Takes background checkpoints of one VM as a bare script would; the images are not kept."""

    def __init__(self, monitor: BareMonitor, folder: Path, qemu_img: Path) -> None:
        self._monitor = monitor
        self._folder = folder
        self._qemu_img = qemu_img
        self._numbers = count()
        self._fdsets = count(FIRST_FDSET)

    def checkpoint(self, disks: Sequence[Disk]) -> float:
        """Take one, and return its pause in ms. Blocks.

        The *disks* are on new overlays afterwards, as they are after one by qsnapd.
        """
        send = self._monitor.send
        image = self._folder / f"floor{next(self._numbers)}.img"
        pivots = [self._add_overlay(disk) for disk in disks]
        before = self._set_capabilities()
        send("migrate-set-parameters", {"max-bandwidth": 2**63 - 1})
        uri = self._hand_over(image, by_fdset="mapped-ram" in before)
        for disk in disks:
            _flush(disk.path)
        with self._monitor.pause() as pause:
            send("stop")
            send("transaction", {"actions": pivots})
            send("migrate", {"uri": uri})
            while not _begun(now := send("query-migrate")):
                if now["status"] == "setup":
                    self._monitor.wait_event("MIGRATION")
            # QEMU <= 8.2 lets the guest run by itself; to be sent one more `cont` is harmless
            send("cont")
        while (status := send("query-migrate")["status"]) != "completed":
            if status == "failed":
                raise RuntimeError("QEMU could not save the memory")
            self._monitor.wait_event("MIGRATION")
        if "mapped-ram" in before:
            send("remove-fd", {"fdset-id": int(uri.rpartition("/")[2])})
        self._set_capabilities(before)
        image.unlink()
        return pause.ms

    def _add_overlay(self, disk: Disk) -> dict[str, object]:
        """Make an overlay over *disk*, give it to QEMU, and return the action that pivots."""
        fdset = next(self._fdsets)
        overlay = f"floor-{fdset}"
        path = self._folder / f"{overlay}.qcow2"
        create = [str(self._qemu_img), "create", "-q", "-u", "-f", "qcow2"]
        create += ["-F", disk.format, "-b", str(disk.path), str(path), str(disk.size_bytes)]
        subprocess.run(create, check=True)
        self._add_fd(path, os.O_RDWR, fdset)
        file = {"driver": "file", "filename": f"/dev/fdset/{fdset}"}
        options = {"driver": "qcow2", "node-name": overlay, "backing": None, "file": file}
        self._monitor.send("blockdev-add", options)
        return {"type": "blockdev-snapshot", "data": {"node": disk.node, "overlay": overlay}}

    def _hand_over(self, image: Path, *, by_fdset: bool) -> str:
        """Create the *image*, give it to QEMU, and return where to migrate to."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        if by_fdset:
            fdset = next(self._fdsets)
            self._add_fd(image, flags, fdset)
            return f"file:/dev/fdset/{fdset}"
        fd = os.open(image, flags, 0o600)
        self._monitor.send("getfd", {"fdname": "floor"}, fd)
        os.close(fd)
        return "fd:floor"

    def _add_fd(self, path: Path, flags: int, fdset: int) -> None:
        fd = os.open(path, flags, 0o600)
        self._monitor.send("add-fd", {"fdset-id": fdset, "opaque": str(path)}, fd)
        os.close(fd)

    def _set_capabilities(self, states: Mapping[str, bool] | None = None) -> dict[str, bool]:
        """Set those that a checkpoint needs, or *states*; return what they were."""
        now = {
            entry["capability"]: entry["state"]
            for entry in self._monitor.send("query-migrate-capabilities")
        }
        wanted = states or {name: name in CAPABILITIES for name in now}
        pairs = [{"capability": name, "state": state} for name, state in wanted.items()]
        self._monitor.send("migrate-set-capabilities", {"capabilities": pairs})
        return now


def _begun(migration: Mapping[str, Any]) -> bool:
    """Has the first page been saved? Only then has the device state been captured."""
    ram = migration.get("ram", {})
    return bool(ram.get("normal", 0) + ram.get("duplicate", 0))


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.close(fd)
