"""What a deletion decides, for every way in which images can lie over each other."""

import json
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from qsnapd.errors import Blocked, WrongState
from qsnapd.image.files import identity
from qsnapd.model.deletion import DeletePlan, Merge
from qsnapd.model.registration import Registration
from qsnapd.model.snapshot import DiskLayer, Machine, Manifest, Process
from qsnapd.snapshot.deleting.checks import refuse_cloned, refuse_newer, refuse_open
from qsnapd.snapshot.deleting.finish import settle_images, without
from qsnapd.snapshot.deleting.former_names import may_name
from qsnapd.snapshot.deleting.graph_reading import read_graph
from qsnapd.snapshot.deleting.plan import Scene, affected, plan_deletion
from qsnapd.store.layout import Store
from qsnapd.store.made import MadeFile
from qsnapd.store.registry import register
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.live_chain import LiveDisk, LiveLayer
from tests.parts import find_qemu

IMG = str(find_qemu("7.2").img)
SIZE_BYTES = 1 << 20
PROCESS = Process(exe="/usr/bin/qemu", argv=("qemu",), cwd="/", uid=0, gid=0)


class World:
    """A VM's store and real images, without a VM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = Store(folder / "state")
        self.store = self.root.vm("web")

    def image(
        self, name: str, below: str | None = None, *, made: bool = True, size: int = SIZE_BYTES
    ) -> Path:
        path = self.folder / f"{name}.qcow2"
        words = [IMG, "create", "-q", "-f", "qcow2"]
        if below:
            words += ["-b", str(self.folder / f"{below}.qcow2"), "-F", "qcow2"]
        subprocess.run([*words, path, str(size)], check=True)
        if made:
            self.store.made.add([identity(path)])
        return path

    def snapshot(
        self, name: str, *chain: str, parent: str | None = None, store: VmStore | None = None
    ) -> None:
        """One whose disk shows the first of *chain*."""
        store = store or self.store
        images = tuple(identity(self.folder / f"{image}.qcow2") for image in chain)
        manifest = Manifest(
            name=name,
            vm=store.vm,
            parent=parent,
            created_at=datetime.now(UTC),
            state="running",
            reason="RUNNING_BOOTED",
            strategy=None,
            image_format=None,
            paused_ms=0,
            total_ms=1,
            memory=None,
            disks=(
                DiskLayer(
                    target="vda",
                    node="disk0",
                    frozen=images[0].path,
                    frozen_format="qcow2",
                    overlay=None,
                    virtual_size_bytes=SIZE_BYTES,
                    chain=images,
                ),
            ),
            qemu_version="7.2.0",
            machine=Machine(type="pc", ram_bytes=1, process=PROCESS),
        )
        store.stage(name)
        store.commit(name, manifest)

    def live(self, *chain: str) -> tuple[LiveDisk, ...]:
        layers = tuple(
            LiveLayer(f"node-{image}", identity(self.folder / f"{image}.qcow2"))
            for image in chain
        )
        return (LiveDisk(target="vda", format="qcow2", layers=layers),)

    def scene(self, *live: str, others: Sequence[VmStore] = ()) -> Scene:
        disks = self.live(*live) if live else None
        return Scene(
            vm="web",
            snapshots=self.store.snapshots(),
            current=self.store.current(),
            graph=read_graph(self.store, others, disks),
            live=disks,
        )

    def plan(self, name: str, *live: str) -> DeletePlan:
        return plan_deletion(name, self.scene(*live))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def told(plan: DeletePlan) -> list[tuple[str, str, str]]:
    return [
        (m.kind, Path(m.source.path).stem, Path(m.destination.path).stem) for m in plan.merges
    ]


def doomed(plan: DeletePlan) -> list[str]:
    return [Path(file.path).stem for file in plan.doomed]


def chain_of_three(world: World) -> None:
    world.image("base", made=False)
    world.image("a", "base")
    world.image("b", "a")
    world.snapshot("s", "base")
    world.snapshot("t", "a", "base", parent="s")


def test_the_newest_goes_down(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("t", "b", "a", "base")
    assert told(plan) == [("commit", "b", "a")]
    assert plan.merges[0].was_active
    assert doomed(plan) == ["b"]


def test_one_in_the_middle_goes_down_and_what_is_over_it_is_told(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("s", "b", "a", "base")
    assert told(plan) == [("commit", "a", "base")]
    assert [Path(image.path).stem for image in plan.merges[0].above] == ["b"]
    assert not plan.merges[0].was_active
    assert doomed(plan) == ["a"]


def test_what_nobody_lies_over_goes_with_what_was_below_for_it_alone(world: World) -> None:
    world.image("below")
    world.image("frozen", "below")
    world.snapshot("s", "frozen", "below")
    world.image("elsewhere", made=False)
    plan = world.plan("s", "elsewhere")
    assert told(plan) == []
    assert doomed(plan) == ["frozen", "below"]


def test_what_others_lie_over_is_copied_into_each(world: World) -> None:
    world.image("base", made=False)
    for name, below in (("f", "base"), ("one", "f"), ("two", "f")):
        world.image(name, below)
    world.snapshot("p", "base")
    world.snapshot("s", "f", "base", parent="p")
    plan = world.plan("s", "one", "f", "base")
    assert told(plan) == [("stream", "f", "one"), ("stream", "f", "two")]
    assert {m.below and Path(m.below.path).stem for m in plan.merges} == {"base"}
    assert doomed(plan) == ["f"]
    assert not plan.commits


def test_what_qsnapd_has_not_made_stays_below_several(world: World) -> None:
    world.image("base", made=False)
    world.image("one", "base")
    world.image("two", "base")
    world.snapshot("s", "base")
    plan = world.plan("s", "one", "base")
    assert (told(plan), doomed(plan)) == ([], [])
    assert "base.qcow2 stays below" in plan.notes[0]


def test_what_qsnapd_has_not_made_is_never_removed(world: World) -> None:
    world.image("base", made=False)
    world.image("a", "base", made=False)
    world.snapshot("s", "base")
    plan = world.plan("s", "a", "base")
    assert told(plan) == [("commit", "a", "base")]
    assert doomed(plan) == []
    assert "a.qcow2 is left where it is" in plan.notes[0]


def test_an_image_that_another_snapshot_shows_stays(world: World) -> None:
    chain_of_three(world)
    world.snapshot("copy", "a", "base", parent="s")
    plan = world.plan("t", "b", "a", "base")
    assert (told(plan), doomed(plan)) == ([], [])
    assert "also the image of copy" in plan.notes[0]


def test_a_vm_that_is_shut_off_finds_its_disk_under_its_name(world: World) -> None:
    chain_of_three(world)
    assert told(world.plan("t")) == [("stream", "a", "b")]


def test_a_vm_that_is_shut_off_finds_its_own_image_again(world: World) -> None:
    world.image("base", made=False)
    world.image("a", "base")
    world.snapshot("s", "base")
    assert told(world.plan("s")) == [("commit", "a", "base")]


def test_what_a_vm_was_last_seen_on_lies_over_it(world: World) -> None:
    """Somebody made that image, and qsnapd knows it from looking only."""
    world.image("base", made=False)
    world.image("a", "base")
    world.snapshot("s", "a", "base")
    assert doomed(world.plan("s")) == ["a"]
    foreign = world.image("foreign", "a", made=False)
    world.store.made.saw([MadeFile(file=identity(foreign))])
    plan = world.plan("s")
    assert told(plan) == [("stream", "a", "foreign")]


def test_a_vm_that_is_shut_off_was_on_the_frozen_image_last(world: World) -> None:
    """Somebody had started it on that: what lies over it would destroy what its guest wrote."""
    world.image("base", made=False)
    world.image("a", "base")
    world.snapshot("s", "base")
    world.store.made.saw([MadeFile(file=identity(world.folder / "base.qcow2"))])
    with pytest.raises(Blocked, match="last seen writing"):
        world.plan("s")


def test_the_last_image_of_a_vm_that_is_shut_off_stays(world: World) -> None:
    chain_of_three(world)
    (world.folder / "b.qcow2").unlink()
    assert doomed(world.plan("t")) == ["a"]
    world.store.made.saw([MadeFile(file=identity(world.folder / "a.qcow2"))])
    plan = world.plan("t")
    assert (told(plan), doomed(plan)) == ([], [])


def test_an_image_within_is_not_merged_if_the_vm_was_on_it_last(world: World) -> None:
    chain_of_three(world)
    world.store.made.saw([MadeFile(file=identity(world.folder / "a.qcow2"))])
    with pytest.raises(Blocked, match="last seen"):
        world.plan("s")


def test_what_another_vm_was_seen_on_is_in_the_way(world: World) -> None:
    """Of its own making, and without any snapshot."""
    chain_of_three(world)
    other = world.root.vm("other")
    foreign = world.image("foreign", "b", made=False)
    other.made.saw([MadeFile(file=identity(foreign))])
    with pytest.raises(WrongState, match="VM other"):
        plan_deletion("t", world.scene(others=[other]))


def test_what_is_forgotten_can_be_taken_in_again(world: World) -> None:
    """Neither is its image merged into, nor removed with what was above it."""
    chain_of_three(world)
    world.snapshot("copy", "a", "base", parent="s")
    world.store.forget("copy", "01234567")
    plan = world.plan("t", "b", "a", "base")
    assert (told(plan), doomed(plan)) == ([], [])
    assert "copy (forgotten)" in plan.notes[0]
    world.image("top", "b")
    world.snapshot("u", "top", "b", "a", "base", parent="t")
    world.snapshot("v", "b", "a", "base", parent="t")
    world.store.forget("v", "01234567")
    world.image("elsewhere", made=False)
    assert doomed(world.plan("u", "elsewhere")) == ["top"]


def test_a_disk_that_was_left_out_keeps_its_image(world: World) -> None:
    chain_of_three(world)
    without_disk = world.store.manifest("s")
    left = world.store.manifest("t").disks
    world.snapshot("u", "base")
    world.store.replace(
        without_disk.model_copy(update={"name": "u", "disks": (), "left_out": left})
    )
    plan = world.plan("s", "b", "a", "base")
    settle_images(world.store, plan.merges, but="s")
    [disk] = world.store.manifest("u").left_out
    assert [Path(file.path).stem for file in disk.chain] == ["base"]
    assert disk.frozen == disk.chain[0].path
    world.store.replace(world.store.manifest("u").model_copy(update={"left_out": left}))
    world.image("elsewhere", made=False)
    (world.folder / "b.qcow2").unlink()
    assert doomed(world.plan("t", "elsewhere")) == []


def test_a_disk_that_was_unplugged_keeps_its_name(world: World) -> None:
    chain_of_three(world)
    world.image("elsewhere", made=False)
    assert told(world.plan("t", "elsewhere")) == [("stream", "a", "b")]


def test_a_read_only_disk_is_in_the_way(world: World) -> None:
    chain_of_three(world)
    base = identity(world.folder / "base.qcow2")
    scene = replace(world.scene("b", "a", "base"), read_only={(base.device, base.inode): "vdb"})
    with pytest.raises(Blocked, match="read-only disk vdb"):
        plan_deletion("s", scene)


def test_nobody_waits_for_a_pipe(world: World) -> None:
    """Whoever may write an image's header may name anything in it."""
    chain_of_three(world)
    os.mkfifo(world.folder / "pipe")
    path = world.image("odd", "a")
    words = [IMG, "rebase", "-u", "-F", "raw", "-b", str(world.folder / "pipe"), str(path)]
    subprocess.run(words, check=True)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack(">I", 0xE2792ACA))
    content[at : at + 4] = b"none"  # an extension that nobody knows
    path.write_bytes(content)
    with pytest.raises(Blocked, match="pipe"):
        world.plan("t", "b", "a", "base")


@pytest.mark.parametrize("name", [b"/a\0b", b"/a\xffb", b"json:{"])
def test_names_that_cannot_be_names_are_told(world: World, name: bytes) -> None:
    chain_of_three(world)
    path = world.image("odd", "a")
    content = bytearray(path.read_bytes())
    at, length = struct.unpack_from(">QI", content, 8)
    content[at : at + length] = name.ljust(length, b" ")
    path.write_bytes(content)
    with pytest.raises(Blocked, match="odd") as caught:
        world.plan("t", "b", "a", "base")
    assert str(caught.value).encode()


def test_a_name_in_json_is_one(world: World) -> None:
    chain_of_three(world)
    path = world.image("odd")
    text = {"driver": "qcow2", "file": {"filename": str(world.folder / "a.qcow2")}}
    words = [IMG, "rebase", "-u", "-F", "qcow2", "-b", f"json:{json.dumps(text)}", str(path)]
    subprocess.run(words, check=True)
    assert told(world.plan("t", "b", "a", "base")) == [("stream", "a", "b"), ("stream", "a", "odd")]


def test_what_qemu_was_told_otherwise_is_not_known(world: World) -> None:
    chain_of_three(world)
    with pytest.raises(Blocked, match="by what the images say"):
        world.plan("t", "b", "base")


def test_what_was_written_below_when_nobody_looked_is_not_destroyed(world: World) -> None:
    base, a = world.image("base", made=False), world.image("a", "base")
    world.snapshot("s", "base")
    scene = world.scene()
    plan = plan_deletion("s", scene)
    after_s = a.stat().st_mtime + 60
    os.utime(base, (after_s, after_s))
    refuse_newer(plan, scene)  # nothing would be written there
    io = str(find_qemu("7.2").img.with_name("qemu-io"))
    subprocess.run([io, "-f", "qcow2", "-c", "write 0 64k", str(a)], check=True)
    os.utime(base, (after_s, after_s))
    with pytest.raises(Blocked, match="was written to after"):
        refuse_newer(plan, scene)
    manifest = plan.manifest.model_copy(update={"deleting": True})
    refuse_newer(plan.model_copy(update={"manifest": manifest}), scene)
    os.utime(a, (after_s + 1, after_s + 1))
    refuse_newer(plan, scene)


def test_other_qemus_are_in_the_way(world: World) -> None:
    chain_of_three(world)
    scene = world.scene()
    plan = plan_deletion("t", scene)
    refuse_open(plan, scene)
    io = str(find_qemu("7.2").img.with_name("qemu-io"))
    image = world.folder / "b.qcow2"
    with subprocess.Popen(
        [io, "-f", "qcow2", "-r", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu_io:
        assert qemu_io.stdin is not None
        assert qemu_io.stdout is not None
        qemu_io.stdin.write(b"read 0 64k\n")
        qemu_io.stdin.flush()
        assert b"read" in qemu_io.stdout.readline()
        with pytest.raises(WrongState, match="is open in a QEMU"):
            refuse_open(plan, scene)
        qemu_io.stdin.close()


def test_a_clone_is_started_again_from_its_snapshot(world: World) -> None:
    chain_of_three(world)
    clone = world.root.vm("clone")
    registration = Registration(
        name="clone",
        qmp="/none",
        source="web",
        snapshot="t",
        created_at=datetime.now(UTC),
        overlays=(),
        files=(),
    )
    register(clone, registration)
    refuse_cloned([clone], "web", "s")
    with pytest.raises(WrongState, match="clone"):
        refuse_cloned([clone], "web", "t")


def test_a_vm_on_the_frozen_image_is_not_merged_into(world: World) -> None:
    chain_of_three(world)
    with pytest.raises(Blocked, match="wrong image"):
        world.plan("t", "a", "base")


def test_a_larger_image_below_is_refused(world: World) -> None:
    world.image("base", made=False, size=2 * SIZE_BYTES)
    world.image("a", "base", size=SIZE_BYTES)
    world.snapshot("s", "base")
    with pytest.raises(Blocked, match="change the size"):
        world.plan("s", "a", "base")


def test_what_cannot_be_read_may_need_anything(world: World) -> None:
    chain_of_three(world)
    (world.store.path("s") / "snapshot.json").write_text("{")
    with pytest.raises(Blocked, match="--metadata"):
        world.plan("t", "b", "a", "base")


def test_an_image_that_is_missing_may_lie_anywhere(world: World) -> None:
    chain_of_three(world)
    world.image("c", "b")
    world.snapshot("u", "b", "a", "base", parent="t")
    (world.folder / "b.qcow2").rename(world.folder / "moved.qcow2")
    with pytest.raises(Blocked, match="missing"):
        world.plan("s", "a", "base")


def test_another_vms_images_are_in_the_way(world: World) -> None:
    chain_of_three(world)
    clone = world.root.vm("clone")
    world.image("its", "a")
    clone.made.add([identity(world.folder / "its.qcow2")])
    for name in "st":
        with pytest.raises(WrongState, match="VM clone"):
            plan_deletion(name, world.scene("b", "a", "base", others=[clone]))


def test_all_that_changes_is_known(world: World) -> None:
    chain_of_three(world)
    world.image("lone", made=False)
    world.snapshot("far", "lone")
    plan = world.plan("s", "b", "a", "base")
    assert set(affected(plan, world.store.snapshots())) == {"s", "t"}


@pytest.mark.parametrize(
    ("kind", "left"), [("commit", ["base"]), ("stream", ["a"])]
)
def test_manifests_say_what_the_images_are_like_then(
    world: World, kind: Literal["commit", "stream"], left: list[str]
) -> None:
    chain_of_three(world)
    [merge] = world.plan("s", "b", "a", "base").merges
    merge = Merge(target="vda", kind=kind, lower=merge.lower, upper=merge.upper)
    settle_images(world.store, [merge], but="s")
    settle_images(world.store, [merge], but="s")  # changes nothing
    [disk] = world.store.manifest("t").disks
    assert [Path(file.path).stem for file in disk.chain] == left
    assert disk.frozen == disk.chain[0].path
    assert [file.path for file in disk.known_as] == [merge.source.path]
    assert [f.path for f in world.store.made.former(disk.chain)] == [merge.source.path]
    unchanged = world.store.manifest("s")
    assert without(unchanged, merge) is unchanged


def test_names_follow_an_image_that_moves_again(world: World) -> None:
    chain_of_three(world)
    base, a, b = (identity(world.folder / f"{n}.qcow2") for n in ("base", "a", "b"))
    made = world.store.made
    made.moved(b, a)
    made.moved(a, base)
    assert {Path(file.path).stem for file in made.former([base])} == {"a", "b"}


def test_names_that_no_command_line_has_are_dropped_but_the_last(world: World) -> None:
    chain_of_three(world)
    base, a, b = (identity(world.folder / f"{n}.qcow2") for n in ("base", "a", "b"))
    made = world.store.made
    gone = [a.model_copy(update={"path": f"/d/gone{n}.qcow2"}) for n in range(5)]
    for file in gone:
        made.moved(file, base)
    made.moved(gone[0].model_copy(update={"path": "/d/other.qcow2"}), b)
    argv = ("qemu", "-blockdev", '{"filename": "/d/gone1.qcow2"}')
    made.keep_former(lambda path: may_name(argv, path))
    assert [file.path for file in made.former([base])] == ["/d/gone1.qcow2", "/d/gone4.qcow2"]
    assert [file.path for file in made.former([b])] == ["/d/other.qcow2"]
    made.moved(gone[1], base)  # made again, and merged again: it is the last one now
    made.keep_former(lambda path: False)
    assert [file.path for file in made.former([base])] == ["/d/gone1.qcow2"]


@pytest.mark.parametrize(
    ("word", "path", "may"),
    [
        ("file=/d/a.qcow2,format=qcow2", "/d/a.qcow2", True),
        ("file=a.qcow2", "/d/a.qcow2", True),
        ("file=/d/b.qcow2", "/d/a.qcow2", False),
        ("file=/d/a,,b.qcow2", "/d/a,b.qcow2", True),
        ("-nodefaults", '/d/a"b.qcow2', True),
    ],
)
def test_what_a_command_line_may_name(word: str, path: str, may: bool) -> None:
    assert may_name(["qemu", word], path) is may


def test_only_what_is_still_the_same_file_is_ours(world: World) -> None:
    path = world.image("a")
    assert [made.file.path for made in world.store.made.files()] == [str(path)]
    path.rename(path.with_suffix(".kept"))
    path.touch()
    assert world.store.made.files() == ()
