"""A real systemd for tests: process 1 of namespaces of its own, ended with all it started.

It sees this host's files, but has a /run, /etc, /var/lib and cgroups of its own, and units of
ours only.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from tests.harness import FileWatch
from tests.parts import ROOT, PartMissing

BOOT_LIMIT_S = 30.0
COMMAND_LIMIT_S = 60.0
END_LIMIT_S = 20.0

SOMEBODY = 1234
"""A user of the namespaces, for what only users with a name can do."""

TARGETS = ("sysinit.target", "basic.target", "shutdown.target", "multi-user.target")
JOURNAL = {
    "journald.socket": """
        [Unit]
        DefaultDependencies=no
        [Socket]
        ListenStream=/run/systemd/journal/stdout
        ListenDatagram=/run/systemd/journal/socket
        Service=journald.service
        """,
    "journald.service": """
        [Unit]
        DefaultDependencies=no
        [Service]
        Type=notify
        ExecStart=/lib/systemd/systemd-journald
        Sockets=journald.socket
        StandardOutput=null
        """,
    "tests.target": """
        [Unit]
        DefaultDependencies=no
        AllowIsolate=yes
        Requires=journald.service
        After=journald.service
        """,
}
"""As little as a journal needs: Debian's own units want half of a booted system."""

BOOT = """
set -e
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for folder in /run /var/lib /var/log; do mount -t tmpfs tmpfs "$folder"; done
# what systemd sets up, or says, on a host that it has to itself
cp -a /etc /run/etc
mount --bind /run/etc /etc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /dev/null /dev/kmsg
mkdir -p /run/systemd/system
# the users of a service may not get to where we have these
echo "somebody:x:$SOMEBODY:$SOMEBODY::/run/somebody:/bin/sh" >>/etc/passwd
bind() { mkdir -p "$2"; mount --bind "$1" "$2"; }
bind "$PYTHON" /run/python
bind "$PACKAGES" /run/packages
bind "$PROJECT" /run/project/qsnapd
exec env -i container=tests PATH="$PATH" NOTIFY_SOCKET="$NOTIFY_SOCKET" \
    SYSTEMD_UNIT_PATH="$UNITS:/run/systemd/transient" SYSTEMD_GENERATOR_PATH=/run/none \
    SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none \
    /lib/systemd/systemd --system --unit=tests.target --log-target=console --show-status=no
"""
PYTHON = (
    "PYTHONDONTWRITEBYTECODE=1",
    "PYTHONPATH=/run/project:/run/packages",
    "LD_LIBRARY_PATH=/run/python/lib",
)
"""What the Python of these tests needs where it is mounted for all users."""
PROGRAM = """#!/bin/sh
export {environment}
exec /run/python/bin/python3 \
    -c 'from qsnapd.cli.{module} import main; main()' "$@"
"""
PROGRAMS = {"qsnapd": "daemon", "qsnapctl": "main"}
ENTER = """
echo $$ >"$0"/cgroup.procs
# all of it ends when nobody holds the other end of our stdin any more, whatever became of us
exec 3<&0
( (cat <&3 >/dev/null; kill -KILL $$) & )
exec unshare --pid --fork --kill-child --mount-proc --mount --cgroup --ipc sh "$1" 3<&- </dev/null
"""


class Manager:
    """A systemd while `open_manager` holds it."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        """Open to everybody, and gone with the manager."""
        self.qsnapd = folder / "qsnapd"
        """The program, as any user of the namespaces can run it; beside it is qsnapctl."""
        self.python_environment = PYTHON
        self._units = folder / "units"
        self._pid = pid

    async def run(
        self, *argv: str | Path, text: str = "", status: int | None = 0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program beside that systemd, with *text* as its input."""
        enter = ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--cgroup", "--ipc", "--"]
        with trio.fail_after(COMMAND_LIMIT_S):
            done = await trio.run_process(
                [*enter, *map(str, argv)],
                stdin=text.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert status in (None, done.returncode), (argv, done.stdout, done.stderr)
        return done

    async def systemctl(self, *words: str) -> str:
        return (await self.run("systemctl", *words)).stdout.decode()

    async def property(self, unit: str, name: str) -> str:
        return (await self.systemctl("show", "--value", f"--property={name}", unit)).strip()

    async def main_pid(self, unit: str) -> int:
        """The unit's main process, as we know it; 0 if there is none."""
        inner = int(await self.property(unit, "MainPID"))
        return self.outer_pid(inner) if inner else 0

    def outer_pid(self, inner: int) -> int:
        """Our number for a process of the namespace."""
        namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                lines = Path(f"/proc/{name}/status").read_text().splitlines()
                [numbers] = [line.split() for line in lines if line.startswith("NSpid:")]
                if numbers[-1] == str(inner) and os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    return int(name)
        raise AssertionError(f"process {inner} has ended")

    async def journal(self, unit: str) -> str:
        """What systemd and the unit's processes have said of it."""
        return (await self.run("journalctl", "--output=cat", f"--unit={unit}")).stdout.decode()

    async def install(self, name: str, text: str) -> None:
        """Add a unit, or change one."""
        (self._units / name).write_text(_unindented(text))
        await self.systemctl("daemon-reload")

    async def serve(self, config: Path) -> None:
        """Run the daemon as its own unit file has it; it is ready on return."""
        text = (ROOT / "systemd" / "qsnapd.service").read_text()
        text = text.replace("/usr/bin/qsnapd", str(self.qsnapd))
        text = text.replace("/etc/qsnapd/qsnapd.toml", str(config))
        await self.install("qsnapd.service", text)
        await self.systemctl("start", "qsnapd.service")

    async def ctl(self, line: str) -> str:
        """Run `qsnapctl LINE` and return what it said."""
        return (await self.run(self.folder / "qsnapctl", *line.split())).stdout.decode()

    async def wait_attached(self, vm: str) -> None:
        """Wait until the daemon is up and has found *vm*."""
        with trio.fail_after(COMMAND_LIMIT_S):
            while True:  # each question takes a moment
                asked = await self.run(
                    self.folder / "qsnapctl", "--json", "dominfo", vm, status=None
                )
                if asked.returncode == 0 and json.loads(asked.stdout)["connected"]:
                    return


@asynccontextmanager
async def open_manager() -> AsyncIterator[Manager]:
    """Boot a systemd and hold it for the block; on exit nothing is left of what it started."""
    if os.geteuid() != 0:
        raise PartMissing("root (systemd needs namespaces and a cgroup of its own)")
    folder = Path(tempfile.mkdtemp(prefix="sd"))
    cgroup = _make_cgroup(folder.name)
    try:
        _fill(folder)
        notify = folder / "notify"
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            await ready.bind(str(notify))
            environment = os.environ | {
                "NOTIFY_SOCKET": str(notify),
                "UNITS": f"{folder}/units",
                "PYTHON": sys.base_prefix,
                "PACKAGES": sysconfig.get_path("purelib"),
                "PROJECT": str(ROOT / "qsnapd"),
                "SOMEBODY": str(SOMEBODY),
            }
            argv = ["sh", "-c", ENTER, str(cgroup), str(folder / "boot")]
            with (folder / "console").open("w+") as console:
                async with trio.open_nursery() as nursery:
                    start = partial(
                        trio.run_process,
                        argv,
                        env=environment,
                        check=False,
                        stdin=subprocess.PIPE,
                        stdout=console,
                        stderr=console,
                    )
                    process: trio.Process = await nursery.start(start)
                    try:
                        with trio.fail_after(BOOT_LIMIT_S):
                            while b"READY=1" not in await ready.recv(4096):
                                pass
                        nursery.start_soon(_hear, ready)
                        yield Manager(folder, _only_child(process.pid))
                    except trio.TooSlowError as late:
                        late.add_note((folder / "console").read_text())
                        raise
                    finally:
                        with trio.fail_after(END_LIMIT_S, shield=True):
                            assert process.stdin is not None
                            await process.stdin.aclose()
                            await process.wait()
                        nursery.cancel_scope.cancel()
    finally:
        with trio.fail_after(END_LIMIT_S, shield=True):
            await _remove_cgroup(cgroup)
        shutil.rmtree(folder)


async def _hear(ready: trio.socket.SocketType) -> None:
    """Listen to whatever else systemd says: it waits, for ever, until somebody does."""
    while True:
        await ready.recv(4096)


def _fill(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "boot").write_text(BOOT)
    for program, module in PROGRAMS.items():
        (folder / program).write_text(PROGRAM.format(module=module, environment=" ".join(PYTHON)))
        (folder / program).chmod(0o755)
    units = folder / "units"
    units.mkdir()
    for target in TARGETS:
        (units / target).write_text("[Unit]\nDefaultDependencies=no\n")
    for name, text in JOURNAL.items():
        (units / name).write_text(_unindented(text))


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def _make_cgroup(name: str) -> Path:
    """Make a cgroup below our own; systemd will take it for the root of all."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [fields[4] for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
    if not found:
        raise PartMissing("a cgroup2 file system")
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    [ours] = [line.removeprefix("0::") for line in groups if line.startswith("0::")]
    cgroup = Path(found[0]) / ours.lstrip("/") / f"qsnapd-{name}"
    cgroup.mkdir()
    return cgroup


async def _remove_cgroup(cgroup: Path) -> None:
    """Wait until all processes in it have ended, and remove it."""
    events = cgroup / "cgroup.events"
    with FileWatch(events) as watch:
        while "populated 1" in _text(events):
            await watch.changed()
    for path in sorted(_folders(cgroup), reverse=True):  # innermost first
        path.rmdir()


def _text(path: Path) -> str:
    return path.read_text()


def _folders(top: Path) -> list[Path]:
    return list(top.glob("**/"))


def _only_child(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
