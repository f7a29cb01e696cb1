"""Thawing in the background what no job could thaw, until the guest's agent says that it is."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import trio

from qsnapd.errors import QsnapError, VmBusy
from qsnapd.model.event import Event, EventKind
from qsnapd.snapshot.taking.thaw import may_be_frozen, thaw_owed
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.provisions import Provisions

AGAIN_FIRST_S = 0.5
AGAIN_LONGEST_S = 15.0
ATTEMPT_LIMIT_S = 20.0

_log = logging.getLogger(__name__)


class Freezable(Protocol):
    """The VM's supervisor, as far as thawing needs it."""

    name: str
    store: VmStore
    provisions: Provisions
    attached: AttachedVm | None
    problem: str | None


class Thawer:
    """Pays what thaws are owed to the guest of one VM."""

    def __init__(self, vm: Freezable, publish: Callable[[Event], None]) -> None:
        self._vm = vm
        self._publish = publish
        self._wanted = trio.Event()

    def look(self) -> None:
        """Look whether a thaw is owed: a QEMU was attached, its guest runs, or a job has ended."""
        self._wanted.set()

    async def run(self) -> None:
        """Thaw whenever that is owed; never returns."""
        while True:
            await self._wanted.wait()
            delay_s = AGAIN_FIRST_S
            while True:
                self._wanted = trio.Event()
                vm = self._vm.attached
                # without a QEMU there is nothing to thaw, and at the next one somebody looks again
                if vm is None or await self._try_once(vm):
                    break
                with trio.move_on_after(delay_s):
                    await self._wanted.wait()
                delay_s = min(2 * delay_s, AGAIN_LONGEST_S)

    async def _try_once(self, vm: AttachedVm) -> bool:
        """Thaw if that is owed; returns whether nothing is owed now.

        What stands in the way is logged and is the VM's problem, until it has been thawed.
        """
        store, agent = self._vm.store, self._vm.provisions.agent
        try:
            done = await thaw_owed(vm, store, agent, limit_s=ATTEMPT_LIMIT_S)
        except VmBusy:
            return False  # whoever has the agent thaws what is owed, too
        except QsnapError as exc:
            self._note(f"{may_be_frozen(vm.name)} ({exc})")
            return False
        self._clear()
        if done is not None:
            _log.warning("VM %s: %s", vm.name, done)
            at = datetime.now(UTC)
            self._publish(
                Event(
                    kind=EventKind.SNAPSHOT, vm=vm.name, at=at, event="recovered", detail=done
                )
            )
        return True

    def _note(self, problem: str) -> None:
        if problem != self._vm.problem:
            _log.warning("VM %s: %s", self._vm.name, problem)
        self._vm.problem = problem

    def _clear(self) -> None:
        if self._vm.problem is not None and may_be_frozen(self._vm.name) in self._vm.problem:
            self._vm.problem = None
