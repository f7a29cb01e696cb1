"""Starting QEMU by way of a real systemd, so that it outlives whoever has it started."""

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from qsnapd.model.plan import Launch
from qsnapd.store.pending import Deadline, Pending, PendingPlan
from qsnapd.vm.proc import TOKEN_VARIABLE, launch_token
from tests.harness import Pages, Vm, open_vm
from tests.parts import ROOT, qemu_versions
from tests.system import launching
from tests.system.manager import Manager, open_manager

NEWEST = qemu_versions()[-1]
NOBODY = 65534
UNIT = "qemu-web.service"
ODD_WORDS = ("$HOME", "${HOME}", "%n%%", "a b;\"c'", r"\x41\d", "")


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    async with open_manager() as manager:
        yield manager


@pytest.fixture
async def vm() -> AsyncIterator[Vm]:
    """A VM that is shut off, everything it needs is there."""
    async with open_vm(NEWEST, Pages(spin=20000), memory_mib=64) as vm:
        await vm.kill()
        yield vm


def in_foreground(vm: Vm) -> tuple[str, ...]:
    return tuple(word for word in vm.argv if word != "-daemonize")


def launch_of(vm: Vm, argv: Sequence[str], token: str = "0badcafe", uid: int = 0) -> Launch:
    return Launch(
        token=token,
        executable=str(NEWEST.system),
        argv=tuple(argv),
        cwd=str(vm.folder),
        uid=uid,
        gid=uid,
        environment=((TOKEN_VARIABLE, token), ("XDG_ODD", 'a %n "$HOME" \\x')),
    )


def give_to_nobody(vm: Vm) -> None:
    for path in (vm.folder, *vm.folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)


async def launch(
    manager: Manager, vm: Vm, plan: Launch, kind: str, pending_dir: Path | None = None
) -> str:
    """Start *plan* from a process that then ends; returns why it failed, if it did."""
    wanted = {
        "kind": kind,
        "vm": "web",
        "unit": UNIT,
        "pending_dir": str(pending_dir),
        "launch": plan.model_dump_json(),
        "log": str(vm.folder / "log"),
    }
    program = ["env", f"PYTHONPATH={ROOT}", sys.executable, launching.__file__]
    done = await manager.run(*program, vm.qmp, text=json.dumps(wanted))
    return done.stdout.decode().strip()


def cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def variable(pid: int, name: str) -> str | None:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((e.removeprefix(f"{name}=") for e in entries if e.startswith(f"{name}=")), None)


async def test_transient_unit_outlives_us(manager: Manager, vm: Vm) -> None:
    give_to_nobody(vm)
    odd = [f"opt/{number},string=[{word}]" for number, word in enumerate(ODD_WORDS)]
    argv = (*in_foreground(vm), *(word for value in odd for word in ("-fw_cfg", value)))
    plan = launch_of(vm, argv, uid=NOBODY)
    assert await launch(manager, vm, plan, "systemd-run") == ""
    unit = f"qsnapd-web-{plan.token}.service"
    assert cmdline(vm.pid) == [plan.executable, *argv[1:]]
    assert await manager.main_pid(unit) == vm.pid
    assert launch_token(vm.pid) == plan.token
    assert variable(vm.pid, "XDG_ODD") == 'a %n "$HOME" \\x'
    assert os.readlink(f"/proc/{vm.pid}/cwd") == str(vm.folder)
    assert Path(f"/proc/{vm.pid}").stat().st_uid == NOBODY
    assert unit in Path(f"/proc/{vm.pid}/cgroup").read_text()
    assert (await vm.execute("query-status"))["running"]


async def test_transient_unit_of_a_qemu_that_daemonizes(manager: Manager, vm: Vm) -> None:
    plan = launch_of(vm, vm.argv)
    assert await launch(manager, vm, plan, "systemd-run") == ""
    assert await manager.main_pid(f"qsnapd-web-{plan.token}.service") == vm.pid
    assert variable(vm.pid, "PWD") == str(vm.folder)


async def test_transient_unit_that_fails(manager: Manager, vm: Vm) -> None:
    bad = launch_of(vm, (*in_foreground(vm), "-nonsense"))
    assert "-nonsense: invalid option" in await launch(manager, vm, bad, "systemd-run")
    assert await manager.property(f"qsnapd-web-{bad.token}.service", "LoadState") == "not-found"


UNIT_TEXT = """
    [Service]
    ExecStart={wrapper} exec --config {config} web -- {words}
    Restart={restart}
    RestartSec=20ms
    User={user}
    [Unit]
    StartLimitIntervalSec=0
    """


async def install(
    manager: Manager,
    vm: Vm,
    words: Sequence[str],
    *,
    user: int = 0,
    restart: str = "no",
) -> Pending:
    """Make the VM a service of its own, which runs *words*."""
    folder = manager.folder
    config = folder / "qsnapd.toml"
    config.write_text(
        f'[daemon]\nstate_dir = "{folder}/state"\n[vm.web]\nqmp = "{vm.qmp}"\n'
        f'launcher = "unit"\nunit = "{UNIT}"\n'
    )
    quoted = " ".join('"' + word.replace("%", "%%").replace("$", "$$") + '"' for word in words)
    await manager.install(
        UNIT,
        UNIT_TEXT.format(
            wrapper=manager.qsnapd, config=config, words=quoted, user=user, restart=restart
        ),
    )
    return Pending.of(folder / "state-pending", "web")


def named(vm: Vm, name: str) -> tuple[str, ...]:
    return (*in_foreground(vm), "-name", name)


def name_of(pid: int) -> str:
    words = cmdline(pid)
    return words[words.index("-name") + 1]


async def wait_restarted(manager: Manager, vm: Vm, old: int) -> int:
    """Return the pid of the next QEMU that the service runs."""
    await vm.wait_line(lambda line: True, since=len(vm.log_lines()))
    pid = await manager.main_pid(UNIT)
    assert pid != old
    return pid


async def test_unit_runs_the_plan_once_whoever_starts_it(
    manager: Manager, vm: Vm
) -> None:
    pending = await install(manager, vm, named(vm, "as-given"), restart="always")
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    first = await manager.main_pid(UNIT)
    assert (name_of(first), launch_token(first)) == ("as-given", None)

    plan = launch_of(vm, named(vm, "planned"))
    pending.put(PendingPlan(vm="web", launch=plan, until=Deadline.after(60)))
    await vm.kill()
    second = await wait_restarted(manager, vm, first)
    assert (name_of(second), launch_token(second)) == ("planned", plan.token)
    assert cmdline(second) == list(plan.argv)
    assert pending.read() is None

    await vm.kill()
    third = await wait_restarted(manager, vm, second)
    assert (name_of(third), launch_token(third)) == ("as-given", None)


@pytest.mark.parametrize("restart", ["no", "always"])
@pytest.mark.parametrize("user", [0, NOBODY])
async def test_unit_is_started_by_us(
    manager: Manager, vm: Vm, restart: str, user: int
) -> None:
    if user:
        give_to_nobody(vm)
    pending = await install(
        manager, vm, named(vm, "as-given"), user=user, restart=restart
    )
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    plan = launch_of(vm, named(vm, "planned"), uid=user)
    pending_dir = pending.folder.path.parent
    # The plan waits; the old QEMU ends; both systemd and the launcher may start the unit.
    pending.put(PendingPlan(vm="web", launch=plan, until=Deadline.after(60)))
    await vm.kill()
    assert await launch(manager, vm, plan, "unit", pending_dir) == ""
    pid = await manager.main_pid(UNIT)
    assert (name_of(pid), launch_token(pid)) == ("planned", plan.token)
    assert Path(f"/proc/{pid}").stat().st_uid == user
    assert pending.read() is None
    if user:
        assert pending.folder.path.stat().st_uid == NOBODY
