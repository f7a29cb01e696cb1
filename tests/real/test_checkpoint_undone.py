"""Cancelled or failed at whatever step: the VM is as if nobody had ever asked."""

from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.errors import CommandRefused, Effect, JobCancelled, QsnapError, ReplyTimeout
from qsnapd.model.job import Phase
from qsnapd.model.request import CreateRequest
from qsnapd.qmp.commands import Command, Cont
from tests.harness import Vm
from tests.real.cases import NEWEST, STRATEGIES, VM, Case, each_strategy, open_busy
from tests.real.footprint import look
from tests.real.steering import steered
from tests.rig import Rig

MOMENTS = 10
UNTOUCHED = (Effect.NONE, Effect.ROLLED_BACK)


class CancelAt:
    """A hook that cancels the job at one step of it."""

    def __init__(self, rig: Rig, step: int) -> None:
        self._rig = rig
        self._step = step
        self.done = False

    async def __call__(self, command: Command[Any], step: int) -> None:
        if step == self._step and not self.done:
            self.done = True
            self._rig.host.abort(VM)


class FailAt:
    """A hook that makes one step of the job fail, and nothing after it."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.failed: Command[Any] | None = None

    def _due(self, command: Command[Any], step: int) -> bool:
        if self.failed is None and step == self._step:
            self.failed = command
            return True
        return False

    async def refuse(self, command: Command[Any], step: int) -> None:
        """Before it takes effect."""
        if self._due(command, step):
            raise CommandRefused(command.name, "GenericError", "the test does not want it")

    async def lose_reply(self, command: Command[Any], step: int) -> None:
        """After it took effect."""
        if self._due(command, step):
            raise ReplyTimeout(f"no answer to {command.name}", effect=Effect.UNKNOWN)


class CountSteps:
    """A hook that counts the job's steps until the guest is let go, or memory has been saved.

    What comes after the first `cont` is asked again as often as it takes.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._over = False
        self.steps = 0

    async def __call__(self, command: Command[Any], step: int) -> None:
        job = self._rig.host.job(VM)
        assert job is not None
        if self._over or job.phase is Phase.FINISHING:
            return
        self.steps = step
        self._over = isinstance(command, Cont)


async def attempt(rig: Rig, request: CreateRequest) -> QsnapError | None:
    """Take a checkpoint; return why there is none, or None if there is."""
    try:
        await rig.create(VM, request)
    except QsnapError as exc:
        return exc
    return None


async def require_content(vm: Vm, rig: Rig, case: Case) -> None:
    """The guest goes on with all it had, and can be checkpointed."""
    assert (await rig.create(VM, case.request("afterwards"))).paused_ms > 0
    await vm.wait_checked()
    assert vm.slots_report().fine
    assert rig.host.vm(VM).state == "running"


async def cancel_when_finishing(rig: Rig, subscribed: trio.Event) -> None:
    with rig.host.subscribe() as events:
        subscribed.set()
        async for event in events:
            if event.event == Phase.FINISHING:
                rig.host.abort(VM)
                return


@each_strategy
async def test_cancelled_at_ten_moments(case: Case, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        count = CountSteps(rig)
        with steered(rig.supervisors[VM], before=count):
            await rig.create(VM, case.request("undisturbed"))
        before = await look(vm, tmp_path)
        moments = sorted({1 + (count.steps - 1) * n // (MOMENTS - 2) for n in range(MOMENTS - 1)})
        assert len(moments) == MOMENTS - 1
        for moment in moments:
            cancel = CancelAt(rig, moment)
            with steered(rig.supervisors[VM], before=cancel) as session:
                error = await attempt(rig, case.request("cancelled"))
            where = f"cancelled at step {moment}, before {session.sent[-1].name}"
            assert isinstance(error, JobCancelled), where
            assert error.effect in UNTOUCHED, where
            assert await look(vm, tmp_path) == before, where
        async with trio.open_nursery() as nursery:
            subscribed = trio.Event()
            nursery.start_soon(cancel_when_finishing, rig, subscribed)
            await subscribed.wait()
            with pytest.raises(JobCancelled):
                await rig.create(VM, case.request("cancelled"))
        assert await look(vm, tmp_path) == before
        await require_content(vm, rig, case)


KINDS = [
    (case, kind)
    for case in STRATEGIES
    for kind in ("refused", "unanswered")
    if kind == "unanswered" or case.qemu is NEWEST  # the worse of the two is enough for both
]


@pytest.mark.parametrize(("case", "kind"), KINDS, ids=str)
async def test_failed_at_each_step(case: Case, kind: str, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        step, failures = 0, 0
        before = await look(vm, tmp_path)
        while True:
            step += 1
            fail = FailAt(step)
            hook = {"before": fail.refuse} if kind == "refused" else {"after": fail.lose_reply}
            name = f"s{step}"
            with steered(rig.supervisors[VM], **hook):
                error = await attempt(rig, case.request(name))
            if fail.failed is None:
                assert error is None
                break
            where = f"step {step}: {fail.failed.name}: {error}"
            if error is not None:
                failures += 1
                assert error.effect in UNTOUCHED, where
                assert name not in {m.name for m in rig.host.snapshots(VM)}, where
                assert await look(vm, tmp_path) == before, where
                continue
            # Too late to fail: the snapshot exists, and the next job tidies up behind it.
            assert rig.host.snapshot(VM, name).name == name
            await rig.create(VM, case.request(f"after-{name}"))
            now = await look(vm, tmp_path)
            assert now.status == "running"
            assert (now.capabilities, now.parameters) == (before.capabilities, before.parameters)
            assert not [path for path in now.files if ".partial" in path.name]
            assert not [path for path in now.files if "journal" in path.name]
            before = now
        assert failures > MOMENTS
        await require_content(vm, rig, case)
