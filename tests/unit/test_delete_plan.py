"""What a deletion decides, for every way in which images can lie over each other."""

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from qsnapd.errors import Blocked, WrongState
from qsnapd.image.files import identity
from qsnapd.model.deletion import DeletePlan, Merge
from qsnapd.model.snapshot import DiskLayer, Machine, Manifest, Process
from qsnapd.snapshot.delete_finish import settle_images, without
from qsnapd.snapshot.delete_plan import Scene, affected, plan_deletion
from qsnapd.snapshot.graph_reading import read_graph
from qsnapd.store.layout import Store
from qsnapd.store.made import MadeFile
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


def test_only_what_is_still_the_same_file_is_ours(world: World) -> None:
    path = world.image("a")
    assert [made.file.path for made in world.store.made.files()] == [str(path)]
    path.rename(path.with_suffix(".kept"))
    path.touch()
    assert world.store.made.files() == ()
