"""Ending what a former daemon, or a job that could not undo itself, has left unfinished."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import trio

from qsnapd.errors import DiskStalled, Effect, JobStalled, QsnapError
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind
from qsnapd.model.plan import JournalEntry, RevertPlan
from qsnapd.patience import STALL_LIMIT_S, Patience
from qsnapd.snapshot.deleting.delete import Deletion, Others
from qsnapd.snapshot.deleting.former_names import note_disks
from qsnapd.snapshot.deleting.recovery import recover_deletion
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.recovery import (
    recover,
    recover_without_qemu,
    rescue_left,
    unfinished_revert,
)
from qsnapd.snapshot.restoring.start import Seat
from qsnapd.snapshot.restoring.switch import Switch
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.proc import find_launched
from qsnapd.vm.process import still_runs
from qsnapd.vm.provisions import Provisions

MEND_FIRST_S = 0.5
MEND_LONGEST_S = 30.0
ATTACH_LIMIT_S = 10.0
"""How long a deletion that goes on waits for its VM to be attached."""

_log = logging.getLogger(__name__)


class Mended(Seat, Protocol):
    """The VM's supervisor, as far as mending needs it."""

    problem: str | None
    is_entering: bool
    others: Others
    provisions: Provisions

    def claim(self, job: Job) -> None: ...
    def let_go(self) -> None: ...
    async def wait_settled(self) -> None: ...
    def note_problem(self, exc: QsnapError) -> None: ...


class Mender:
    """Works through the journals of one VM."""

    def __init__(
        self,
        vm: Mended,
        publish: Callable[[Event], None],
        *,
        qemu_img: str,
        stall_limit_s: float = STALL_LIMIT_S,
    ) -> None:
        self._vm = vm
        self._publish = publish
        self._qemu_img = qemu_img
        self._stall_limit_s = stall_limit_s
        self._stalled: DiskStalled | None = None
        """The file system that the last attempt has waited for in vain."""
        self._mending = trio.Lock()
        self._reverts, self._to_go_on = trio.open_memory_channel[JournalEntry](1)
        self._deletions, self._to_delete = trio.open_memory_channel[str](1)

    async def mend_attached(self, vm: AttachedVm) -> None:
        """The same as `mend`, for a VM that has just been attached; and go on deleting."""
        self._delete_again(await self.mend(vm))

    async def mend(self, vm: AttachedVm) -> str | None:
        """Finish or undo what was left unfinished, if anything was, with QEMU attached.

        Returns the name of the snapshot whose deletion was broken off, if one was.
        Raises: JobStalled: it comes no further. What `recover` raises.
        """
        async with self._attempting():
            patience = Patience(self._stall_limit_s)
            with trio.CancelScope() as scope, patience.extending(scope):
                done = await recover(
                    *(vm, self._vm.store),
                    qemu_img=self._qemu_img,
                    launcher=self._vm.launcher,
                    patience=patience,
                    agent=self._vm.provisions.agent,
                )
            if scope.cancelled_caught:
                raise JobStalled(
                    f"what was left unfinished on VM {self._vm.name} comes no further: it is tried "
                    "again",
                    effect=Effect.UNKNOWN,
                )
            deleted, again = await recover_deletion(self._vm, vm, qemu_img=self._qemu_img)
        if deleted:
            await self._vm.launcher.follow(vm)
        for words in filter(None, (done, deleted)):
            self._tell(words)
        return again

    @asynccontextmanager
    async def _attempting(self) -> AsyncIterator[None]:
        """Keep others from mending, and leave a file system alone that does not answer yet."""
        async with self._mending:
            if self._stalled is not None and not self._stalled.over.is_set():
                raise self._stalled
            self._stalled = None
            try:
                yield
            except DiskStalled as exc:
                self._stalled = exc
                raise

    def leave_alone(self, stalled: DiskStalled) -> None:
        """Mend nothing, and let no job begin, until what is stuck has come to its end."""
        self._stalled = stalled

    async def rescue(self) -> None:
        """Free the guest that a former daemon's save has left frozen; past the monitor.

        Preconditions: no job changes the VM.
        """
        try:
            if done := await rescue_left(self._vm.store):
                self._tell(done)
        except QsnapError as exc:
            self._vm.note_problem(exc)

    async def mend_before_job(self) -> None:
        """The same for a job that is about to begin, with QEMU attached or gone."""
        if self._vm.attached is not None:
            await self.mend(self._vm.attached)
        else:
            await self._mend_offline()

    async def mend_after_job(self, job: Job) -> None:
        """Go on undoing a job whose undoing failed, until it is done or QEMU is lost."""
        delay_s = MEND_FIRST_S
        while not await self.mend_once(job):
            again = self._stalled.over if self._stalled is not None else trio.Event()
            with trio.move_on_after(delay_s):
                await again.wait()
            delay_s = min(2 * delay_s, MEND_LONGEST_S)

    async def mend_once(self, job: Job) -> bool:
        """Put right what *job* has left, if that can be done now.

        Returns whether nothing is left to do, or no QEMU to do it with; else `problem` says why.
        """
        if job.stalled is not None:
            self.leave_alone(job.stalled)
        vm = self._vm.attached  # kept: it may go meanwhile
        if vm is None:
            return not self._vm.is_entering  # whoever attaches it leaves that to us
        try:
            if await self._journal_stands():
                await self.mend(vm)
                self._vm.problem = None
        except QsnapError as exc:
            self._vm.note_problem(exc)
            return False
        return True

    async def _journal_stands(self) -> bool:
        store = self._vm.store
        return any(
            [
                await in_thread(j.read)
                for j in (store.journal, store.restoring, store.deletion)
            ]
        )

    async def mend_offline(self) -> None:
        """Nobody answers there; a journal may tell of a QEMU that has ended, or is frozen."""
        await self.rescue()
        try:
            self._delete_again(await self._mend_offline())
        except QsnapError as exc:
            self._vm.note_problem(exc)

    async def _mend_offline(self) -> str | None:
        store = self._vm.store
        async with self._attempting():
            for journal in (store.journal, store.restoring):
                entry = await in_thread(journal.read)
                if entry is not None and still_runs(entry.pid, entry.start_time_ticks):
                    return None
            deletion = await in_thread(store.deletion.read)
            if deletion is not None and still_runs(deletion.pid, deletion.start_time_ticks):
                return None
            deleted, again = await recover_deletion(self._vm, None, qemu_img=self._qemu_img)
            done = await recover_without_qemu(store, qemu_img=self._qemu_img)
            entry = await unfinished_revert(store)
        for words in filter(None, (done, deleted)):
            self._tell(words)
        if entry is not None and not await self._is_coming_up(entry):
            with suppress(trio.WouldBlock):  # it is going on already
                self._reverts.send_nowait(entry)
        return again

    def _delete_again(self, snapshot: str | None) -> None:
        if snapshot is not None:
            with suppress(trio.WouldBlock):
                self._deletions.send_nowait(snapshot)

    async def go_on_deleting(self) -> None:
        """Begin deletions again that a daemon did not finish; never returns."""
        async for name in self._to_delete:
            if name not in await in_thread(self._vm.store.snapshots):
                continue
            job = Job(0, self._vm.name, JobKind.DELETE, name, lambda job: None)
            try:
                self._vm.claim(job)
            except QsnapError:
                continue  # it stays listed as being deleted, and can be deleted again
            try:
                with trio.move_on_after(ATTACH_LIMIT_S):
                    await self._vm.wait_settled()
                deletion = Deletion(self._vm, job, self._vm.others, qemu_img=self._qemu_img)
                await job.run(partial(deletion.run, name))
                if self._vm.attached is not None:
                    await self._vm.launcher.follow(self._vm.attached)
                    await note_disks(self._vm.attached, self._vm.store)
                if job.effect is Effect.UNKNOWN:  # the guest may be held back
                    await self.mend_after_job(job)
            finally:
                self._vm.let_go()
            if job.error is None:
                self._tell(f"deleted snapshot {name}, which a former daemon had begun to")
            else:
                self._vm.note_problem(job.error)

    async def _is_coming_up(self, entry: JournalEntry) -> bool:
        """Whether a QEMU that the revert has started is there, though it does not answer yet."""
        plan = entry.plan
        fallback = plan.fallback if isinstance(plan, RevertPlan) else None
        tokens = [plan.token, *([fallback.token] if fallback else [])]
        found = [await in_thread(find_launched, token) for token in tokens]
        return any(pid is not None for pid in found)

    async def go_on_reverting(self) -> None:
        """Finish reverts whose VM was ended by a daemon that has died since; never returns."""
        async for entry in self._to_go_on:
            job = Job(0, self._vm.name, JobKind.REVERT, entry.plan.name, lambda job: None)
            try:
                self._vm.claim(job)
            except QsnapError:
                continue  # whoever came first will hear of the journal
            try:
                switch = Switch(self._vm, job)
                await job.run(partial(switch.go_on, entry))
            finally:
                self._vm.let_go()
            if job.error is None:
                self._tell(f"finished the revert to {entry.plan.name} of a former daemon")
            else:
                self._vm.note_problem(job.error)

    def _tell(self, done: str) -> None:
        _log.warning("VM %s: %s", self._vm.name, done)
        self._publish(
            Event(
                kind=EventKind.SNAPSHOT,
                vm=self._vm.name,
                at=datetime.now(UTC),
                event="recovered",
                detail=done,
            )
        )
