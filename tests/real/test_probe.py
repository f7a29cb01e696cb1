"""A QEMU that is asked and never run: what it tells is true, and nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsnapd.errors import VmError
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Machine, Process
from qsnapd.qmp.commands import QueryStatus
from qsnapd.qmp.migration import MigrateSetCapabilities
from qsnapd.snapshot.restoring.differences import compare_cpu
from qsnapd.vm.argv import Option
from qsnapd.vm.probe import Probe, UnknownMachine, probe
from qsnapd.vm.proc import status_of
from qsnapd.vm.throwaway import open_throwaway
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_lazy
from tests.real.test_verify import children

NOBODY = 65534
STILL = (Option("nodefaults"), Option("display", "none"), Option("S"))
LIMIT_S = 60.0


def process(qemu: Qemu, *words: str) -> Process:
    """Return a QEMU that may have run; as somebody else, if we may start it as such."""
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    group = NOBODY if os.geteuid() == 0 else os.getegid()
    argv = ("qemu", "-accel", "tcg", *words)
    return Process(exe=str(qemu.system), argv=argv, cwd="/", uid=user, gid=group)


def machine(qemu: Qemu, *words: str, type_: str | None = None) -> Machine:
    oldest = "pc-i440fx-7.2"
    return Machine(type=type_ or oldest, ram_bytes=1 << 27, process=process(qemu, *words))


async def ask(qemu: Qemu, *words: str, type_: str | None = None) -> Probe:
    return await probe(str(qemu.system), machine(qemu, *words, type_=type_))


@each_qemu
async def test_it_tells_what_a_running_vm_tells(qemu: Qemu, tmp_path: Path) -> None:
    """Also of a CPU that lacks some of what was asked for."""
    more = ["-cpu", "Skylake-Client,+avx512f,-xsave"]
    async with open_lazy(qemu, tmp_path, extra=more) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        asked = await probe(str(qemu.system), manifest.machine)
    assert asked.machine_type == manifest.machine.type
    assert asked.version.text == manifest.qemu_version
    assert asked.cpu == manifest.machine.cpu == "Skylake-Client-x86_64-cpu"
    assert asked.cpu_features == manifest.machine.cpu_features
    assert asked.cpu_features is not None
    assert {"sse2", "avx2"} <= set(asked.cpu_features)
    assert {"avx512f", "xsave", "pcid", "realized"}.isdisjoint(asked.cpu_features)
    assert ("mapped-ram" in asked.capabilities) == (qemu.version != "7.2")
    assert not asked.loads_lazily  # no released QEMU does
    assert children() == []


@each_qemu
async def test_cpus_are_compared_by_what_guests_see(qemu: Qemu) -> None:
    rich = await ask(qemu, "-cpu", "max")
    poor = await ask(qemu, "-M", "q35", "-cpu", "qemu64,-sse3")
    then = replace(rich, cpu=poor.cpu)
    recorded = machine(qemu).model_copy(
        update={"cpu": then.cpu, "cpu_features": then.cpu_features}
    )
    [difference] = compare_cpu(recorded, poor)
    assert difference.can_be_forced
    assert "the guest would lose 3dnow, " in difference.now
    assert "more" in difference.now
    assert list(compare_cpu(machine(qemu), rich)) == []


@each_qemu
async def test_refusals_in_qemus_words(qemu: Qemu) -> None:
    with pytest.raises(UnknownMachine, match=r"no machine type pc-i440fx-99\.9"):
        await ask(qemu, type_="pc-i440fx-99.9")
    with pytest.raises(VmError, match="unable to find CPU model 'Abacus'"):
        await ask(qemu, "-cpu", "Abacus")
    with pytest.raises(VmError, match="cannot start /no/such/qemu: No such file"):
        await probe("/no/such/qemu", machine(qemu))
    assert children() == []


@each_qemu
async def test_it_runs_as_the_user_that_the_vm_had(qemu: Qemu) -> None:
    recorded = process(qemu)
    async with open_throwaway(recorded, str(qemu.system), STILL) as throwaway:
        status = status_of(throwaway.pid)
        assert {int(uid) for uid in status["Uid"].split()} == {recorded.uid}
        assert {int(gid) for gid in status["Gid"].split()} == {recorded.gid}
        if os.geteuid() == 0:
            assert int(status["CapEff"], 16) == 0
        assert not (await throwaway.session.execute(QueryStatus())).running
    assert children() == []


@each_qemu
async def test_the_vms_environment_is_qemus_alone(qemu: Qemu) -> None:
    """Nothing that the VM's user could choose has a say while it is not that user yet."""
    entries = (("LD_PRELOAD", "/no/such/library"), ("LANG", "C"), ("HOME", "/höme"))
    recorded = process(qemu).model_copy(update={"environment": entries})
    async with open_throwaway(recorded, str(qemu.system), STILL) as throwaway:
        environ = await trio.Path(f"/proc/{throwaway.pid}/environ").read_bytes()
        assert environ.removesuffix(b"\0").decode().split("\0") == [
            "=".join(entry) for entry in entries
        ]


@each_qemu
async def test_what_the_block_raises_comes_out_bare(qemu: Qemu) -> None:
    async def hold(before: Callable[[int], object]) -> None:
        async with open_throwaway(process(qemu), str(qemu.system), STILL) as throwaway:
            before(throwaway.pid)
            await trio.sleep_forever()

    def fail(_pid: int) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await hold(fail)
    assert children() == []
    with pytest.raises(VmError, match="QEMU"):
        await hold(lambda pid: os.kill(pid, signal.SIGKILL))
    assert children() == []
    with trio.move_on_after(LIMIT_S) as scope:
        await hold(lambda _pid: scope.cancel())
    assert scope.cancelled_caught
    assert children() == []


async def test_one_that_ends_as_soon_as_it_answers() -> None:
    """Its end may come between two looks at the connection: none of twenty is missed."""

    async def end_one() -> None:
        async with open_throwaway(process(NEWEST), str(NEWEST.system), STILL) as throwaway:
            os.kill(throwaway.pid, signal.SIGKILL)
            await trio.sleep_forever()

    with trio.fail_after(LIMIT_S):
        for _ in range(20):
            with pytest.raises(VmError):
                await end_one()


@each_qemu
async def test_a_network_of_its_own(qemu: Qemu) -> None:
    recorded = process(qemu)
    for user in {recorded.uid, os.geteuid()}:
        someone = recorded.model_copy(update={"uid": user, "gid": user})
        async with open_throwaway(
            someone, str(qemu.system), STILL, own_network=True
        ) as throwaway:
            place = os.readlink(f"/proc/{throwaway.pid}/ns/net")
            assert place != os.readlink("/proc/self/ns/net")
            may_make_interfaces = int(status_of(throwaway.pid)["CapEff"], 16) >> 12 & 1
            assert may_make_interfaces


PARENT = """
import json, sys, trio
from qsnapd.model.snapshot import Process
from qsnapd.vm.argv import Option
from qsnapd.vm.throwaway import open_throwaway

async def main():
    process = Process.model_validate(json.loads(sys.argv[1]))
    still = (Option("nodefaults"), Option("display", "none"), Option("S"))
    async with open_throwaway(process, process.exe, still) as throwaway:
        print(throwaway.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@each_qemu
async def test_it_does_not_outlive_a_parent_that_is_killed(qemu: Qemu) -> None:
    text = process(qemu).model_dump_json()
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            run = trio.run_process
            parent = await nursery.start(
                lambda task_status: run(
                    [sys.executable, "-c", PARENT, text],
                    stdout=subprocess.PIPE,
                    check=False,
                    task_status=task_status,
                )
            )
            line = b""
            while not line.endswith(b"\n"):
                line += await parent.stdout.receive_some()
            orphan = os.pidfd_open(int(line))
            try:
                parent.kill()
                await trio.lowlevel.wait_readable(orphan)  # it has ended, too
            finally:
                os.close(orphan)
    assert json.loads(text)["exe"] == str(qemu.system)


@each_qemu
async def test_lazy_load_is_asked_by_trying(qemu: Qemu) -> None:
    """On every released QEMU both capabilities are refused together."""
    both = {"mapped-ram": True, "postcopy-ram": True}
    async with open_throwaway(process(qemu), str(qemu.system), STILL) as throwaway:
        with pytest.raises(VmError):
            await throwaway.session.execute(MigrateSetCapabilities.of(both))
