"""What `qsnapd exec` turns into, and what it refuses to."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qsnapd.errors import Blocked
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.pending import NewestDisk, Pending, PendingPlan
from qsnapd.vm.become import on_newest_images

NOBODY = 65534
FILES = {
    "/img/base.raw": (7, 10),
    "/img/a.qcow2": (7, 11),
    "/img/b.qcow2": (7, 12),
    "/img/link.raw": (7, 10),
    "/img/other.raw": (7, 13),
}


def image(path: str) -> FileIdentity:
    device, inode = FILES.get(path, (7, 99))
    return FileIdentity(path=path, device=device, inode=inode)


def disk(*paths: str) -> NewestDisk:
    return NewestDisk(target="vda", chain=tuple(map(image, paths)))


MOVED = disk("/img/b.qcow2", "/img/a.qcow2", "/img/base.raw")
BACKED = (
    "-blockdev file,node-name=f,filename=/img/base.raw "
    "-blockdev qcow2,node-name=b,file.driver=file,file.filename=/img/a.qcow2,backing=f"
)


@pytest.mark.parametrize(
    ("words", "moved", "expected"),
    [
        ("-hda base.raw", [MOVED], "-drive file=/img/b.qcow2,format=qcow2,index=0,media=disk"),
        ("-drive file=/img/link.raw,format=raw", [MOVED], "-drive file=/img/b.qcow2,format=qcow2"),
        ("-drive file=/img/a.qcow2", [MOVED], "-drive file=/img/b.qcow2,format=qcow2"),
        ("-drive file=/img/b.qcow2", [MOVED], None),
        ("-drive file=/img/other.raw", [MOVED], None),
        ("-drive file=/img/base.raw,readonly=on", [MOVED], None),
        ("-drive file=/img/base.raw", [disk("/img/gone.qcow2", "/img/base.raw")], None),
        ("-drive file=/img/base.raw", [], None),
        (BACKED, [disk("/img/a.qcow2", "/img/base.raw")], None),
        (BACKED, [MOVED], BACKED.replace("/img/a.", "/img/b.")),
    ],
)
def test_a_snapshots_image_is_not_written_to(
    words: str, moved: list[NewestDisk], expected: str | None
) -> None:
    said: list[str] = []
    given = ("qemu", *words.split())
    found = on_newest_images(given, moved, cwd="/img", tell=said.append, identify=FILES.get)
    if expected is None:
        assert found is given or found == given
        assert said == []
    else:
        options = dict(zip(*[iter(found[1:])] * 2, strict=True)) if expected[:6] != "-block" else {}
        if options:
            name, _, value = expected.partition(" ")
            assert sorted(options[name].split(",")) == sorted(value.split(","))
        else:
            assert "/img/b.qcow2" in " ".join(found)
            assert "/img/a.qcow2" not in " ".join(found)
        assert len(said) == 1
        assert "/img/b.qcow2" in said[0]


def test_an_image_named_twice_is_refused() -> None:
    words = ["qemu", "-drive", "file=/img/base.raw", "-drive", "file=/img/link.raw"]
    with pytest.raises(Blocked, match="more than once"):
        on_newest_images(words, [MOVED], cwd="/img", identify=FILES.get)


SHOW = (
    "import json, os, sys; print(json.dumps([os.getpid(), sys.argv[1:], os.getcwd(), "
    "os.environ.get('QSNAPD_TOKEN'), os.environ.get('OUTER'), "
    # without the one that lists them
    "[fd for fd in map(int, os.listdir('/proc/self/fd')) if os.path.exists(f'/dev/fd/{fd}')]]))"
)


class Wrapper:
    """`qsnapd exec` with a configuration, run as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending = Pending.of(folder / "state-pending", "web")
        self.config = folder / "qsnapd.toml"
        self.config.write_text(
            f'[daemon]\nstate_dir = "{folder}/state"\n[vm.web]\nqmp = "{folder}/qmp"\n'
        )

    def start(
        self, *words: str, vm: str = "web", pass_fds: Sequence[int] = ()
    ) -> "subprocess.Popen[str]":
        program = [sys.executable, "-c", "from qsnapd.cli.daemon import main; main()"]
        return subprocess.Popen(
            [*program, "exec", "--config", str(self.config), vm, "--", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OUTER": "kept"},
            pass_fds=pass_fds,
            cwd=self.folder,
        )

    def plan(self, *argv: str, executable: str = sys.executable, uid: int | None = None) -> None:
        launch = Launch(
            token="0badcafe",
            executable=executable,
            argv=argv,
            cwd=str(self.folder / "there"),
            uid=os.geteuid() if uid is None else uid,
            gid=os.getegid(),
            environment=(("QSNAPD_TOKEN", "0badcafe"),),
        )
        self.pending.put(PendingPlan(vm="web", launch=launch, until=None))


@pytest.fixture
def wrapper(tmp_path: Path) -> Wrapper:
    (tmp_path / "there").mkdir()
    return Wrapper(tmp_path)


def test_the_same_process_goes_on_with_all_it_was_given(wrapper: Wrapper) -> None:
    inherited, other = os.pipe()
    wrapper.plan("python", "-c", SHOW, "planned")
    for words, cwd, token in (
        (["planned"], wrapper.folder / "there", "0badcafe"),
        (["$as", "%given"], wrapper.folder, None),
    ):
        process = wrapper.start(sys.executable, "-c", SHOW, "$as", "%given", pass_fds=[inherited])
        said, complaints = process.communicate(timeout=60)
        assert process.returncode == 0, complaints
        *shown, descriptors = json.loads(said)
        assert sorted(descriptors) == [0, 1, 2, inherited]
        assert shown == [process.pid, words, str(cwd), token, "kept"]
    os.close(inherited)
    os.close(other)


@pytest.mark.parametrize(
    ("words", "vm", "complaint"),
    [
        (["/nowhere/qemu"], "web", "cannot execute /nowhere/qemu: No such file"),
        (["true"], "wbe", "has no [vm.wbe]"),
    ],
)
def test_what_cannot_be_run(
    wrapper: Wrapper, words: list[str], vm: str, complaint: str
) -> None:
    process = wrapper.start(*words, vm=vm)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 1
    assert complaint in complaints


def test_a_plan_that_cannot_be_run_stays_and_nothing_else_runs(wrapper: Wrapper) -> None:
    wrapper.plan("qemu", executable="/nowhere/qemu")
    process = wrapper.start("echo", "ran")
    said, complaints = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "cannot execute /nowhere/qemu" in complaints
    assert wrapper.pending.read() is not None


def test_a_plan_that_cannot_be_read_means_that_nothing_runs(wrapper: Wrapper) -> None:
    wrapper.plan("qemu")
    (wrapper.pending.folder.path / "plan.json").chmod(0o666)
    process = wrapper.start("echo", "ran")
    said, complaints = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "is believed" in complaints


def test_runs_as_whom_the_plan_says_or_not_at_all(wrapper: Wrapper) -> None:
    wrapper.plan("id", "-u", executable="/usr/bin/id", uid=NOBODY)
    process = wrapper.start("echo", "ran")
    said, complaints = process.communicate(timeout=60)
    if os.geteuid() == 0:
        assert (process.returncode, said) == (0, f"{NOBODY}\n")
    else:
        assert (process.returncode, said) == (1, "")
        assert f"is to run as user {NOBODY}" in complaints
