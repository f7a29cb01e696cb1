"""A launcher that notes how its VM runs, because nobody else knows how to start it again."""

import logging
from pathlib import Path

from qsnapd.errors import QsnapError
from qsnapd.model.plan import Launch
from qsnapd.model.registration import LastSeen, SeenDisk
from qsnapd.store.registry import note_last_seen
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks
from qsnapd.vm.launcher import Launcher, Started

_log = logging.getLogger(__name__)


class Remembering:
    """For clones. Starts as *launcher* does, and keeps what it sees in *store*."""

    def __init__(self, launcher: Launcher, store: VmStore) -> None:
        self._launcher = launcher
        self._store = store

    @property
    def inherits_descriptors(self) -> bool:
        return self._launcher.inherits_descriptors

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        await self._launcher.prepare(launch, lasting=lasting)

    async def abandon(self) -> None:
        await self._launcher.abandon()

    async def keep_off(self) -> None:
        await self._launcher.keep_off()

    async def start(self, launch: Launch, log: Path) -> Started:
        return await self._launcher.start(launch, log)

    async def follow(self, vm: AttachedVm) -> None:
        """Note the command line and where the disks are. Never raises: a failure is logged."""
        await self._launcher.follow(vm)
        try:
            disks = await read_disks(vm.session, vm.identity.pid)
            seen = LastSeen(
                machine=vm.machine(),
                disks=tuple(
                    SeenDisk(target=disk.target, chain=disk.chain)
                    for disk in disks
                    if disk.left_out is None
                ),
            )
            await in_thread(note_last_seen, self._store, seen)
        except QsnapError as exc:
            _log.warning("VM %s: once shut off, it may not start again: %s", vm.name, exc)

    def instruction(self, launch: Launch) -> str | None:
        return self._launcher.instruction(launch)
