"""All of a snapshot that can be made beforehand: files and nodes. The guest notices nothing.

The invariant: no file is written to that the journal does not know.
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from qsnapd.faults import Point
from qsnapd.image.files import create_exclusive, identity
from qsnapd.model.plan import CheckpointPlan, JournalEntry, Place
from qsnapd.qmp.migration import MigrateSetCapabilities, MigrateSetParameters
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.memory import MemoryTarget
from qsnapd.snapshot.taking.overlay_node import add_overlay_node
from qsnapd.snapshot.taking.overlays import complete_overlay, open_overlay, publish_overlays
from qsnapd.snapshot.taking.targets import flush_disks
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_slow_thread, in_thread
from qsnapd.vm.attached import AttachedVm


class Preparation:
    """Of one plan; holds what it opens until its block ends."""

    def __init__(self, vm: AttachedVm, store: VmStore, job: Job, entry: JournalEntry) -> None:
        self._vm = vm
        self._store = store
        self._job = job
        self._opened = ExitStack()
        self.entry = entry
        """What the journal has."""
        self.has_staged = False
        """The folder is ours in which the snapshot grows; else it may be an import's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    async def make(self, *, qemu_img: str) -> MemoryTarget | None:
        """Make it all; returns where the memory goes, None if it is left out.

        On failure or cancellation: as far as it came; the plan's undo finds out how far.
        Raises: TargetRefused, StoreError, VmError.
        """
        plan, session, reach = self._plan, self._vm.session, self._job.reach
        if plan.capabilities:  # first, because QEMU may refuse them
            await session.execute(MigrateSetCapabilities.of(plan.capabilities))
        await reach(Point.CREATE_CAPABILITIES_SET)
        if plan.keeps_metadata:
            await in_thread(self._store.stage, plan.name)
            self.has_staged = True
        await reach(Point.CREATE_STAGED)
        target = None
        if plan.memory_partial is not None:
            memory = await self._open(partial(create_exclusive, Path(plan.memory_partial)))
            target = MemoryTarget(plan, memory)
            await in_thread(target.reserve)
        await self._make_overlays(target, qemu_img=qemu_img)
        if target is not None:
            await session.execute(MigrateSetParameters(parameters=plan.parameters))
            await reach(Point.CREATE_PARAMETERS_SET)
            await target.hand_over(session)
            await reach(Point.CREATE_MEMORY_HANDED_OVER)
        await in_slow_thread(partial(flush_disks, plan), self._job.patience)
        await reach(Point.CREATE_PREPARED)
        return target

    @property
    def _plan(self) -> CheckpointPlan:
        assert isinstance(self.entry.plan, CheckpointPlan)
        return self.entry.plan

    async def _make_overlays(self, target: MemoryTarget | None, *, qemu_img: str) -> None:
        plan, reach = self._plan, self._job.reach
        plans = [pivot.overlay for pivot in plan.pivots]
        overlays = [await self._open(partial(open_overlay, overlay)) for overlay in plans]
        files = list(zip(plans, map(identity, overlays), strict=True))
        made = [file for overlay, file in files if overlay.place is Place.NEW]
        given = [file for overlay, file in files if overlay.place is not Place.NEW]
        empty = [file for overlay, file in files if overlay.place is Place.EMPTY]
        memories = [identity(target.descriptor)] if target else []
        await reach(Point.CREATE_FILES_MADE)
        await self._write_down(made=(*memories, *made), given=tuple(empty))
        await reach(Point.CREATE_FILES_NOTED)
        for overlay, descriptor in zip(plans, overlays, strict=True):
            await complete_overlay(overlay, descriptor, qemu_img=qemu_img)
        if given != empty:  # what these held before must never be merged into a disk
            await self._write_down(given=tuple(given))
        await reach(Point.CREATE_OVERLAYS_FILLED)
        await publish_overlays(plans)
        await reach(Point.CREATE_OVERLAYS_PUBLISHED)
        for pivot, descriptor in zip(plan.pivots, overlays, strict=True):
            await add_overlay_node(self._vm, pivot, descriptor)
        await reach(Point.CREATE_NODES_ADDED)

    async def _write_down(self, **known: object) -> None:
        self.entry = self.entry.model_copy(update=known)
        await in_thread(self._store.journal.write, self.entry)

    async def _open(self, opening: partial[int]) -> int:
        descriptor = await in_thread(opening)
        self._opened.callback(os.close, descriptor)
        return descriptor
