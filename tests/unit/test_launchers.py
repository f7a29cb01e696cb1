"""Who starts a QEMU, and with which words."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qsnapd.config import Config
from qsnapd.daemon.launchers import launcher_for, launcher_for_clone
from qsnapd.errors import Blocked, VmError
from qsnapd.model.plan import Launch
from qsnapd.store.pending import Pending
from qsnapd.vm.argv import parse_options, words_of
from qsnapd.vm.descriptors import apply_instead, refuse_descriptors
from qsnapd.vm.launcher import Manual
from qsnapd.vm.spawn import Spawn
from qsnapd.vm.systemd import SystemdRun, Unit, transient_words


def launch(*argv: str, executable: str = sys.executable, cwd: str = "/") -> Launch:
    return Launch(
        token="0badcafe",
        executable=executable,
        argv=argv,
        cwd=cwd,
        uid=os.geteuid(),
        gid=os.getegid(),
        environment=(("QSNAPD_TOKEN", "0badcafe"), ("PATH", "/usr/bin")),
    )


def test_the_configuration_chooses() -> None:
    config = Config.model_validate(
        {
            "vm": {
                "a": {"qmp": "/a"},
                "b": {"qmp": "/b", "launcher": "systemd-run"},
                "c": {"qmp": "/c", "launcher": "unit", "unit": "c.service"},
                "d": {"qmp": "/d", "launcher": "manual"},
            }
        }
    )
    kinds = (Spawn, SystemdRun, Unit, Manual)
    assert tuple(type(launcher_for(name, config)) for name in "abcd") == kinds
    clones = (Spawn, SystemdRun, SystemdRun, Manual)
    assert tuple(type(launcher_for_clone(name, "x", config)) for name in "abcd") == clones
    inherits = [launcher_for(name, config).inherits_descriptors for name in "abcd"]
    assert inherits == [False, False, True, True]


async def test_a_process_of_its_own(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(f'{os.getsid(0) == os.getpid()} {os.getcwd()}')"
    plan = launch("python", "-c", code, cwd=str(tmp_path))
    started = await Spawn().start(plan, tmp_path / "log")
    started.process.wait()
    assert started.failed() == f"True {tmp_path}"
    assert started.patience_s == 60
    started.kill()


async def test_a_process_that_ends_without_a_word(tmp_path: Path) -> None:
    started = await Spawn().start(launch("python", "-c", "exit(7)"), tmp_path / "log")
    started.process.wait()
    assert started.failed() == "exit status 7"
    well = await Spawn().start(launch("python", "-c", ""), tmp_path / "log")
    well.process.wait()
    assert well.failed() is None


async def test_a_process_is_killed(tmp_path: Path) -> None:
    started = await Spawn().start(launch("sleep", "999", executable="/bin/sleep"), tmp_path / "log")
    assert started.failed() is None
    started.kill()
    assert started.process.wait() == -9


async def test_a_program_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(VmError, match=r"cannot start /nowhere/qemu: .*No such file"):
        await Spawn().start(launch("qemu", executable="/nowhere/qemu"), tmp_path / "log")


def test_words_for_a_person_are_quoted_for_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['QSNAPD_TOKEN'])"
    plan = launch("python", "-c", code, "a b", "$HOME", "'", cwd=str(folder))
    line = Manual(patience_s=1).instruction(plan)
    assert line is not None
    said = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout
    assert said == f"{['a b', '$HOME', chr(39)]} {folder} 0badcafe\n"


async def test_a_person_starts_it_in_their_own_time() -> None:
    manual = Manual(patience_s=3600)
    await manual.prepare(launch("qemu"))
    started = await manual.start(launch("qemu"), Path("/none"))
    assert (started.failed(), started.patience_s) == (None, 3600)
    started.kill()


def test_words_for_systemd() -> None:
    plan = launch("qemu", "-name", "$A ${B} %n", executable="/bin/q$")
    words = list(transient_words("u.service", "web", plan, ["Slice=x.slice"]))
    assert words[words.index("--") :] == ["--", "/bin/q$$", "-name", "$$A $${B} %n"]
    assert {"--unit=u.service", "--service-type=exec", "--property=Slice=x.slice"} < set(words)
    assert "--setenv=PWD=/" in words
    daemonizes = transient_words("u.service", "web", launch("qemu", "-daemonize"))
    assert "--service-type=forking" in daemonizes


async def test_without_a_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    pending = Pending.of(tmp_path / "pending", "web")
    with pytest.raises(VmError, match="cannot run systemctl: No such file"):
        await Unit("web", "web.service", pending, patience_s=1).prepare(launch("qemu"))
    with pytest.raises(VmError, match="cannot run systemd-run: No such file"):
        await SystemdRun("web", patience_s=1).start(launch("qemu"), tmp_path / "log")
    assert pending.read() is None


INSTEAD = {
    "netdev=net0": "tap,id=net0,ifname=tap0,script=no",
    "add-fd=2": "",
    "blockdev=disk": '{"driver": "file", "node-name": "disk", "filename": "/img"}',
    "chardev=unused": "null,id=unused",
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-netdev tap,id=net0,fd=3", ("-netdev", INSTEAD["netdev=net0"])),
        ("--netdev tap,id=net1,ifname=x", ("--netdev", "tap,id=net1,ifname=x")),
        ("-add-fd fd=3,set=2,opaque=disk -S", ("-S",)),
        ("-add-fd fd=3,set=1", None),
        ("-netdev tap,fd=3,id=net7", None),
        (
            '-blockdev {"driver":"file","node-name":"disk","filename":"/dev/fdset/2"}',
            ("-blockdev", INSTEAD["blockdev=disk"]),
        ),
        ("-incoming fd:3 -name netdev=net0", ("-incoming", "fd:3", "-name", "netdev=net0")),
    ],
)
def test_what_cannot_be_repeated_is_replaced(words: str, expected: tuple[str, ...] | None) -> None:
    options = apply_instead(parse_options(words.split()), INSTEAD)
    if expected is not None:
        assert words_of(options) == expected
        for option in options:
            refuse_descriptors(option)
        return
    key = "add-fd=1" if "set=1" in words else "netdev=net7"
    with pytest.raises(Blocked, match=shlex.quote(key).strip("'")) as refused:
        refuse_descriptors(options[0])
    assert f'[vm.NAME.instead] what is to be used instead: "{key}" = "..."' in str(refused.value)
