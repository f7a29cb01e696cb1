"""Starting QEMU by way of a real systemd, so that it outlives whoever has it started."""

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.pending import Deadline, NewestDisk, Pending, PendingPlan
from qsnapd.vm.proc import TOKEN_VARIABLE, launch_token, open_files
from tests.harness import Pages, Vm, open_vm
from tests.parts import ROOT, qemu_versions
from tests.system import launching
from tests.system.manager import SOMEBODY, Manager, open_manager

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


def give(vm: Vm, user: int) -> None:
    """Let a QEMU of *user* do what the VM's has done so far."""
    for path in (vm.folder, *vm.folder.iterdir()):
        os.chown(path, user, user)


def wanted_of(vm: Vm, plan: Launch, kind: str, pending_dir: Path | None = None) -> dict[str, str]:
    """What `launching` reads."""
    return {
        "kind": kind,
        "vm": "web",
        "unit": UNIT,
        "pending_dir": str(pending_dir),
        "launch": plan.model_dump_json(),
        "log": str(vm.folder / "log"),
    }


async def launch(
    manager: Manager, vm: Vm, plan: Launch, kind: str, pending_dir: Path | None = None
) -> str:
    """Start *plan* from a process that then ends; returns why it failed, if it did."""
    wanted = wanted_of(vm, plan, kind, pending_dir)
    program = ["env", f"PYTHONPATH={ROOT}", sys.executable, launching.__file__]
    done = await manager.run(*program, vm.qmp, text=json.dumps(wanted))
    return done.stdout.decode().strip()


def cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def variable(pid: int, name: str) -> str | None:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((e.removeprefix(f"{name}=") for e in entries if e.startswith(f"{name}=")), None)


def user_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def cgroup_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


async def test_transient_unit_outlives_us(manager: Manager, vm: Vm) -> None:
    give(vm, NOBODY)
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
    assert user_of(vm.pid) == NOBODY
    assert unit in cgroup_of(vm.pid)
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
    {more}
    ExecStart={wrapper} exec --config {config} web -- {words}
    Restart={restart}
    RestartSec=20ms
    User={user}
    [Unit]
    StartLimitIntervalSec=0
    """


def config_of(manager: Manager) -> Path:
    return manager.folder / "qsnapd.toml"


def write_config(manager: Manager, vm: Vm, more: str) -> None:
    config_of(manager).write_text(
        f'[daemon]\nstate_dir = "{manager.folder}/state"\nqemu_img = "{NEWEST.img}"\n'
        f'[vm.web]\nqmp = "{vm.qmp}"\n{more}'
    )


async def install(
    manager: Manager,
    vm: Vm,
    words: Sequence[str],
    *,
    user: int = 0,
    restart: str = "no",
    more: str = "",
) -> Pending:
    """Make the VM a service of its own, which runs *words*."""
    write_config(manager, vm, f'launcher = "unit"\nunit = "{UNIT}"\n')
    quoted = " ".join('"' + word.replace("%", "%%").replace("$", "$$") + '"' for word in words)
    await manager.install(
        UNIT,
        UNIT_TEXT.format(
            wrapper=manager.qsnapd,
            config=config_of(manager),
            words=quoted,
            user=user,
            restart=restart,
            more=more,
        ),
    )
    return Pending.of(manager.folder / "state-pending", "web")


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
    give(vm, user)
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
    assert user_of(pid) == user
    assert pending.read() is None
    assert os.stat(pending.folder.path).st_uid == user


async def test_unit_whose_plan_fails(manager: Manager, vm: Vm) -> None:
    """What went wrong is told in QEMU's words, and nothing is left that would run later."""
    pending = await install(manager, vm, named(vm, "as-given"))
    plan = launch_of(vm, (*in_foreground(vm), "-nonsense"))
    pending.put(PendingPlan(vm="web", launch=plan, until=Deadline.after(60)))
    words = await launch(manager, vm, plan, "unit", pending.folder.path.parent)
    assert "-nonsense: invalid option" in words
    assert vm.pids() == []
    assert pending.read() is None


async def test_unit_that_may_not_take_plans(manager: Manager, vm: Vm) -> None:
    """A plan that cannot be taken may not be passed over either: nothing runs."""
    strict = f"ProtectSystem=strict\nReadWritePaths={vm.folder}"
    pending = await install(manager, vm, named(vm, "as-given"), more=strict)
    plan = launch_of(vm, named(vm, "planned"))
    pending.put(PendingPlan(vm="web", launch=plan, until=None))
    words = await launch(manager, vm, plan, "unit", pending.folder.path.parent)
    assert "Read-only file system: a service with ProtectSystem= needs it in its Read" in words
    assert vm.pids() == []

    strict += f"\nReadWritePaths={pending.folder.path}"
    pending = await install(manager, vm, named(vm, "as-given"), more=strict)
    pending.put(PendingPlan(vm="web", launch=plan, until=None))
    assert await launch(manager, vm, plan, "unit", pending.folder.path.parent) == ""
    assert name_of(vm.pid) == "planned"


async def test_unit_that_cannot_run_plans(manager: Manager, vm: Vm) -> None:
    await manager.install("plain.service", "[Service]\nExecStart=/bin/sleep 999\n")
    await install(manager, vm, named(vm, "as-given"), user=SOMEBODY)
    for unit, vm_name, uid, expected in (
        ("none.service", "web", SOMEBODY, "not-found"),
        ("plain.service", "web", SOMEBODY, "ExecStart= must be `/usr/bin/qsnapd exec web -- `"),
        (UNIT, "other", SOMEBODY, "ExecStart= must be `/usr/bin/qsnapd exec other -- `"),
        (UNIT, "web", NOBODY, f"ran as user {NOBODY}, which it cannot become"),
        (UNIT, "web", SOMEBODY, "fine"),
    ):
        code = (
            "import sys; from qsnapd.vm.systemd import require_wrapper; "
            "require_wrapper(*sys.argv[1:3], int(sys.argv[3])); sys.exit('fine')"
        )
        program = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code]
        done = await manager.run(*program, unit, vm_name, str(uid), status=1)
        assert expected in done.stderr.decode()


async def test_unit_uses_the_newest_images(manager: Manager, vm: Vm) -> None:
    """After a snapshot the image that the unit names is frozen, and left alone."""
    base, overlay = vm.folder / "base.qcow2", vm.folder / "overlay.qcow2"
    words = (*in_foreground(vm), "-drive", f"file={base},if=virtio,format=qcow2")
    pending = await install(manager, vm, words, restart="always")
    create = [NEWEST.img, "create", "-q", "-f", "qcow2"]
    await trio.run_process([str(word) for word in (*create, base, "1M")])
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    first = await manager.main_pid(UNIT)
    assert base in open_names(first)

    await trio.run_process(
        [str(word) for word in (*create, "-F", "qcow2", "-b", base, overlay)]
    )
    chain = tuple(identity_of(path) for path in (overlay, base))
    pending.note([NewestDisk(target="vda", chain=chain)], uid=0, gid=0)
    await vm.kill()
    second = await wait_restarted(manager, vm, first)
    assert {base, overlay} <= open_names(second)
    assert f"using {overlay} in place of {base}" in await manager.journal(UNIT)


def identity_of(path: Path) -> FileIdentity:
    status = path.stat()
    return FileIdentity(path=str(path), device=status.st_dev, inode=status.st_ino)


def open_names(pid: int) -> set[Path]:
    return {Path(name) for name in open_files(pid).values()}


async def test_revert_by_way_of_the_vms_own_unit(manager: Manager, vm: Vm) -> None:
    await install(manager, vm, named(vm, "as-given"), restart="always")
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    first = await manager.main_pid(UNIT)
    await manager.serve(config_of(manager))
    await manager.wait_attached("web")
    await manager.ctl("snapshot-create-as web s1")
    for _ in range(2):
        mark = len(vm.log_lines())
        await manager.ctl("snapshot-revert web s1 --discard")
        assert await manager.ctl("domstate web --reason") == "running (from snapshot)\n"
        second = await manager.main_pid(UNIT)
        assert second != first
        assert vm.pids() == [second]
        assert launch_token(second) is not None
        assert UNIT in cgroup_of(second)
        await vm.wait_line(lambda line: True, since=mark)
        first = second


async def test_unit_that_restarts_itself_leaves_snapshots_alone(manager: Manager, vm: Vm) -> None:
    """Its command line names what is a snapshot's frozen image by now."""
    base = vm.folder / "base.qcow2"
    create = [NEWEST.img, "create", "-q", "-f", "qcow2", base, "1M"]
    await trio.run_process([str(word) for word in create])
    words = (*in_foreground(vm), "-drive", f"file={base},if=virtio,format=qcow2")
    await install(manager, vm, words, restart="always")
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    await manager.serve(config_of(manager))
    await manager.wait_attached("web")
    for step in ("snapshot-create-as web s1", "snapshot-revert web s1 --discard"):
        await manager.ctl(step)
        [disk] = json.loads(await manager.ctl("--json domblklist web"))[-1:]
        newest = Path(disk["path"])
        assert newest != base
        await vm.kill()
        pid = await wait_restarted(manager, vm, 0)
        assert newest in open_names(pid)
        assert launch_token(pid) is None
        await manager.wait_attached("web")
    await manager.ctl("snapshot-revert web s1 --discard")


@pytest.mark.parametrize("launcher", ["spawn", "systemd-run"])
async def test_reverted_vm_outlives_the_service(manager: Manager, vm: Vm, launcher: str) -> None:
    write_config(manager, vm, f'launcher = "{launcher}"\n')
    await manager.run(*vm.argv)
    await manager.serve(config_of(manager))
    await manager.wait_attached("web")
    await manager.ctl("snapshot-create-as web s1")
    await manager.ctl("snapshot-revert web s1 --discard")
    pid = vm.pid
    await manager.systemctl("stop", "qsnapd.service")
    assert vm.pids() == [pid]
    await manager.systemctl("start", "qsnapd.service")
    await manager.wait_attached("web")
    await manager.systemctl("kill", "--signal=KILL", "--kill-who=main", "qsnapd.service")
    assert vm.pids() == [pid]
    assert (await vm.execute("query-status"))["running"]
    await manager.wait_attached("web")
    await manager.ctl("snapshot-revert web s1 --discard")
    assert vm.pid != pid


USER_MANAGER = f"""
    [Service]
    Type=notify
    User={SOMEBODY}
    Slice=user-{SOMEBODY}.slice
    Delegate=yes
    RuntimeDirectory=somebody
    Environment=XDG_RUNTIME_DIR=/run/somebody
    Environment=SYSTEMD_UNIT_PATH={{folder}}/units:/run/somebody/systemd/transient
    ExecStart=/lib/systemd/systemd --user --unit=basic.target
    """


async def test_somebodys_own_systemd(manager: Manager, vm: Vm) -> None:
    """A daemon that is not root has its QEMUs started by the systemd of its user."""
    give(vm, SOMEBODY)
    await manager.install(f"user@{SOMEBODY}.service", USER_MANAGER.format(folder=manager.folder))
    await manager.systemctl("start", f"user@{SOMEBODY}.service")
    program = manager.folder / "launching.py"
    shutil.copy(launching.__file__, program)
    become = ("setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups")
    environment = ("XDG_RUNTIME_DIR=/run/somebody", *manager.python_environment)
    plan = launch_of(vm, in_foreground(vm), uid=SOMEBODY)
    wanted = wanted_of(vm, plan, "systemd-run")
    done = await manager.run(
        *(*become, "env", *environment, "/run/python/bin/python3", program, vm.qmp),
        text=json.dumps(wanted),
    )
    assert done.stdout == b""
    assert user_of(vm.pid) == SOMEBODY
    assert f"user@{SOMEBODY}.service" in cgroup_of(vm.pid)
    assert f"qsnapd-web-{plan.token}.service" in cgroup_of(vm.pid)
    assert launch_token(vm.pid) == plan.token


async def test_unit_is_kept_off(manager: Manager, vm: Vm) -> None:
    await install(manager, vm, named(vm, "as-given"), restart="always")
    await manager.systemctl("start", UNIT)
    await vm.wait_line(lambda line: True)
    code = (
        "import trio; from pathlib import Path; from qsnapd.vm.systemd import Unit; "
        "from qsnapd.store.pending import Pending; "
        f"unit = Unit('web', '{UNIT}', Pending.of(Path('/none'), 'web'), patience_s=1); "
        "trio.run(unit.keep_off); trio.run(unit.keep_off)"
    )
    await manager.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)
    assert vm.pids() == []
    assert await manager.property(UNIT, "ActiveState") == "inactive"
