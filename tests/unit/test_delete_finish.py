"""What is removed at the end of a deletion, and what is not."""

import os
import subprocess
from pathlib import Path

import pytest

from qsnapd.errors import StoreError
from qsnapd.snapshot.deleting.finish import remove_snapshot, settle_images
from qsnapd.store.manifests import read_manifest
from tests.parts import find_qemu
from tests.unit.test_delete_plan import World, chain_of_three

IO = str(find_qemu("7.2").img.with_name("qemu-io"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_all_that_is_of_no_use_goes(world: World) -> None:
    chain_of_three(world)
    world.store.set_current("t")
    plan = world.plan("t", "b", "a", "base")
    world.store.deletion.write(plan)
    remove_snapshot(world.store, plan, is_vouched_for=False)
    remove_snapshot(world.store, plan, is_vouched_for=False)  # changes nothing
    assert not (world.folder / "b.qcow2").exists()
    assert list(world.store.snapshots()) == ["s"]
    assert world.store.current() == "s"
    assert world.store.deletion.read() is None


def test_children_are_the_parents(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("s", "b", "a", "base")
    world.store.deletion.write(plan)
    remove_snapshot(world.store, plan, is_vouched_for=True)
    assert world.store.manifest("t").parent is None


def test_what_is_forgotten_hears_where_its_images_are(world: World) -> None:
    chain_of_three(world)
    folder = world.store.forget("t", "01234567")
    plan = world.plan("s", "b", "a", "base")
    assert [m.kind for m in plan.merges] == ["commit"]
    settle_images(world.store, plan.merges, but="s")
    [disk] = read_manifest(folder / "snapshot.json").disks
    assert [Path(file.path).stem for file in disk.chain] == ["base"]
    assert disk.frozen == disk.chain[0].path


def test_another_file_in_the_place_of_ours_stays(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("t", "b", "a", "base")
    world.store.deletion.write(plan)
    ours = world.folder / "b.qcow2"
    ours.rename(ours.with_suffix(".elsewhere"))
    ours.write_text("mine")
    [note] = remove_snapshot(world.store, plan, is_vouched_for=False)
    assert "another file" in note
    assert ours.read_text() == "mine"


def test_an_image_that_a_qemu_has_open_stays(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("t", "b", "a", "base")
    world.store.deletion.write(plan)
    image = world.folder / "b.qcow2"
    with subprocess.Popen(
        [IO, "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu_io:
        assert qemu_io.stdin is not None
        assert qemu_io.stdout is not None
        qemu_io.stdin.write(b"write 0 64k\n")
        qemu_io.stdin.flush()
        assert b"wrote" in qemu_io.stdout.readline()
        with pytest.raises(StoreError, match="is open in a QEMU"):
            remove_snapshot(world.store, plan, is_vouched_for=False)
        qemu_io.stdin.close()
    assert image.exists()
    assert world.store.deletion.read() == plan


def test_an_image_that_was_written_to_since_stays(world: World) -> None:
    chain_of_three(world)
    plan = world.plan("t", "b", "a", "base")
    world.store.deletion.write(plan)
    image = world.folder / "b.qcow2"
    later_ns = world.store.deletion.written_ns() + 60_000_000_000
    os.utime(image, ns=(later_ns, later_ns))
    with pytest.raises(StoreError, match="written to after"):
        remove_snapshot(world.store, plan, is_vouched_for=False)
    assert image.exists()
