"""Ending what a former daemon, or a job that could not undo itself, has left unfinished."""

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import trio

from qsnapd.errors import QsnapError
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind
from qsnapd.model.plan import JournalEntry, RevertPlan
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.recovery import recover, recover_without_qemu, unfinished_revert
from qsnapd.snapshot.start import Seat
from qsnapd.snapshot.switch import Left, Switch
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.proc import find_launched
from qsnapd.vm.process import still_runs

MEND_FIRST_S = 0.5
MEND_LONGEST_S = 30.0

_log = logging.getLogger(__name__)


class Mended(Seat, Protocol):
    """The VM's supervisor, as far as mending needs it."""

    problem: str | None

    def claim(self, job: Job) -> None: ...
    def let_go(self) -> None: ...
    def note_problem(self, exc: QsnapError) -> None: ...


class Mender:
    """Works through the journals of one VM."""

    def __init__(
        self, vm: Mended, publish: Callable[[Event], None], *, qemu_img: str
    ) -> None:
        self._vm = vm
        self._publish = publish
        self._qemu_img = qemu_img
        self._mending = trio.Lock()
        self._reverts, self._to_go_on = trio.open_memory_channel[JournalEntry](1)

    async def mend(self, vm: AttachedVm) -> None:
        """Finish or undo what was left unfinished, if anything was, with QEMU attached."""
        async with self._mending:
            done = await recover(
                vm, self._vm.store, qemu_img=self._qemu_img, launcher=self._vm.launcher
            )
        if done:
            self._tell(done)

    async def mend_before_job(self) -> None:
        """The same for a job that is about to begin, with QEMU attached or gone."""
        if self._vm.attached is not None:
            await self.mend(self._vm.attached)
        else:
            await self._mend_offline()

    async def mend_after_job(self) -> None:
        """Go on undoing a job whose undoing failed, until it is done or QEMU is lost."""
        delay_s = MEND_FIRST_S
        while (vm := self._vm.attached) is not None:
            try:
                if not await self._journal_stands():
                    return
                await self.mend(vm)  # not self._vm.attached: QEMU may have gone meanwhile
                self._vm.problem = None
            except QsnapError as exc:
                self._vm.note_problem(exc)
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, MEND_LONGEST_S)

    async def _journal_stands(self) -> bool:
        store = self._vm.store
        return any(
            [await trio.to_thread.run_sync(j.read) for j in (store.journal, store.restoring)]
        )

    async def mend_offline(self) -> None:
        """Nobody answers there; a journal may still tell of a QEMU that has ended."""
        try:
            await self._mend_offline()
        except QsnapError as exc:
            self._vm.note_problem(exc)

    async def _mend_offline(self) -> None:
        store = self._vm.store
        async with self._mending:
            for journal in (store.journal, store.restoring):
                entry = await trio.to_thread.run_sync(journal.read)
                if entry is not None and still_runs(entry.pid, entry.start_time_ticks):
                    return
            done = await recover_without_qemu(store, qemu_img=self._qemu_img)
            entry = await unfinished_revert(store)
        if done:
            self._tell(done)
        if entry is not None and not await self._is_coming_up(entry):
            with suppress(trio.WouldBlock):  # it is going on already
                self._reverts.send_nowait(entry)

    async def _is_coming_up(self, entry: JournalEntry) -> bool:
        """Whether a QEMU that the revert has started is there, though it does not answer yet."""
        plan = entry.plan
        fallback = plan.fallback if isinstance(plan, RevertPlan) else None
        tokens = [plan.token, *([fallback.token] if fallback else [])]
        found = [await trio.to_thread.run_sync(find_launched, token) for token in tokens]
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
                switch = Switch(self._vm, job, Left())
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
