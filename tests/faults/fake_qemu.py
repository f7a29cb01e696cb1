"""A QEMU of a few hundred lines, in the test's own process and on the test's clock.

It does what a real one will not do on demand: fail in a given stage, stay silent, answer
late, lose events. Its guest is a clock: while it runs, it ticks, and writes each tick to all
its disks; so a checkpoint is of one instant if memory and frozen disks show the same tick.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from tests.faults.fake_blocks import FakeBlocks
from tests.faults.fake_migration import RAM_BYTES, FakeMigration
from tests.faults.fake_monitor import Arguments, FakeMonitor, Refusal
from tests.unit.crafted_images import RAM

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


@dataclass(frozen=True)
class Facts:
    """What a job has to put back if it does not succeed."""

    status: str
    disks: Mapping[str, str]
    """The node that each disk uses."""
    nodes: frozenset[str]
    inactive: frozenset[str]
    fdsets: Mapping[int, tuple[str | None, ...]]
    named_descriptors: frozenset[str]
    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]
    block_jobs: frozenset[str]
    saving: bool


class FakeQemu:
    """One process with *images* as its disks, {node name: path}, running unless told otherwise."""

    def __init__(self, images: dict[str, str], *, version: str, status: str = "running") -> None:
        self.monitor = FakeMonitor(version)
        self.blocks = FakeBlocks(self.monitor, images)
        self.migration = FakeMigration(self.monitor, self.blocks, self)
        self.status = status
        self.tick = 0
        self.cont_takes_s = 0.0
        """From the reply to `cont` until the guest runs."""
        self.monitor.before = self.live
        major, minor, micro = (int(part) for part in version.split("."))
        numbers = {"major": major, "minor": minor, "micro": micro}
        self._types = {"/machine": f"pc-i440fx-{major}.{minor}-machine"}
        answers: dict[str, object] = {
            "query-version": {"qemu": numbers, "package": "fake"},
            "query-uuid": {"UUID": UUID},
            "query-cpus-fast": [{"cpu-index": 0, "qom-type": "qemu64-x86_64-cpu"}],
            "query-memory-size-summary": {"base-memory": RAM_BYTES},
            "query-memdev": [{"id": RAM, "size": RAM_BYTES}],
        }
        for name, answer in answers.items():
            self.monitor.serve(name, partial(_given, answer))
        self.monitor.serve("query-status", self._query_status)
        self.monitor.serve("qom-get", self._qom_get)
        self.monitor.serve("stop", self._stop)
        self.monitor.serve("cont", self._cont)

    @property
    def running(self) -> bool:
        return self.status == "running"

    def live(self) -> None:
        """Let the guest do something, if it can."""
        if self.running:
            self.tick += 1
            self.blocks.write(self.tick)

    def halt(self, status: str) -> None:
        """Stop the guest if it runs; it is then in *status*."""
        self.live()
        if self.running:
            self.monitor.emit("STOP")
        self.status = status

    def go(self) -> None:
        if not self.running:
            self.blocks.activate(active=True)
            self.status = "running"
            self.monitor.emit("RESUME")

    def _query_status(self, _arguments: Arguments) -> object:
        return {"status": self.status, "running": self.running}

    def _qom_get(self, arguments: Arguments) -> object:
        return self._types.get(arguments["path"], "virtio-blk-device")

    def _stop(self, _arguments: Arguments) -> None:
        if self.running:
            self.halt("paused")

    def _cont(self, _arguments: Arguments) -> None:
        if self.status == "finish-migrate":
            raise Refusal("Migration is not finalized yet")
        if self.cont_takes_s:
            self.monitor.start(self._go_later)
        else:
            self.go()

    async def _go_later(self) -> None:
        await trio.sleep(self.cont_takes_s)
        self.go()

    def facts(self) -> Facts:
        monitor, blocks, migration = self.monitor, self.blocks, self.migration
        return Facts(
            status=self.status,
            disks={name: node.name for name, node in blocks.devices.items()},
            nodes=frozenset(blocks.nodes),
            inactive=frozenset(node.name for node in blocks.nodes.values() if not node.active),
            fdsets={number: tuple(o for _, o in fds) for number, fds in monitor.fdsets.items()},
            named_descriptors=frozenset(monitor.named),
            capabilities=dict(migration.capabilities),
            parameters=dict(migration.parameters),
            block_jobs=frozenset(blocks.jobs),
            saving=migration.under_way,
        )

    def end(self) -> None:
        """The process ends: whatever it was doing stops, its descriptors are closed."""
        self.monitor.end()
        self.blocks.close()
        self.monitor.close()


def _given(answer: object, _arguments: Arguments) -> object:
    return answer
