"""A VM that a person starts: qsnapd says with which words, waits, and drives the load."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import VmError
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.vm.launcher import Manual
from qsnapd.vm.proc import launch_token
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_lazy
from tests.rig import Rig

LIMIT_S = 60.0


async def instruction(rig: Rig) -> str:
    """Return what a person is told to run, once the revert has come to that."""
    with trio.fail_after(LIMIT_S), rig.host.subscribe() as events:
        while (job := rig.host.job(VM)) is None or job.instruction is None:
            await events.receive()
    return job.instruction


@each_qemu
async def test_revert_goes_on_when_somebody_has_started_qemu(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        rig.supervisors[VM].launcher = Manual(patience_s=LIMIT_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.revert, VM, RevertRequest(name="s", discard=True))
            line = await instruction(rig)
            assert vm.pids() == []
            await trio.run_process(line, shell=True)
        assert launch_token(vm.pid) is not None
        assert rig.host.vm(VM).state == "running"
        job = rig.host.last_job(VM)
        assert job is not None
        assert job.instruction is None


@each_qemu
async def test_nobody_starts_it_in_time(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        rig.supervisors[VM].launcher = Manual(patience_s=1)
        with pytest.raises(VmError, match="did not answer within 1 s"):
            await rig.revert(VM, RevertRequest(name="s", discard=True))
        assert vm.pids() == []
        assert rig.host.vm(VM).state == "shut off"
