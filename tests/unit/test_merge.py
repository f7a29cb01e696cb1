"""Merging an overlay whose QEMU is gone, on real qcow2 files: nothing newer is ever lost."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from qsnapd.errors import StoreError
from qsnapd.model.plan import OverlayPlan, PivotPlan
from qsnapd.snapshot.merge import holds_data, merge_offline, require_unwritten
from tests.parts import find_qemu
from tests.real.test_reuse import loop_device

SIZE_BYTES = 1 << 20
IMG = str(find_qemu("7.2").img)
IO = str(find_qemu("7.2").img.with_name("qemu-io"))


@pytest.fixture
def pivot(tmp_path: Path) -> PivotPlan:
    base, overlay = tmp_path / "web.qcow2", tmp_path / "web.after-s.qcow2"
    create = [IMG, "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, base, str(SIZE_BYTES)], check=True)
    subprocess.run([*create, "-b", base, "-F", "qcow2", overlay], check=True)
    write(base, 1)
    os.utime(base, ns=(0, 0))
    return PivotPlan(
        overlay=OverlayPlan(
            target="vda",
            path=str(overlay),
            partial=f"{overlay}.01234567.partial",
            backing=str(base),
            backing_format="qcow2",
            virtual_size_bytes=SIZE_BYTES,
        ),
        node="disk0",
        overlay_node="qsnapd-01234567-0",
        fdset_id=0,
        chain=(),
    )


def write(image: Path | str, pattern: int) -> None:
    subprocess.run(
        [IO, "-f", "qcow2", "-c", f"write -P {pattern} 0 64k", image],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def holds(image: Path | str, pattern: int) -> bool:
    command = [IO, "-f", "qcow2", "-c", f"read -P {pattern} 0 64k", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "Pattern verification failed" not in done.stdout + done.stderr


def merge(pivot: PivotPlan, ours: frozenset[int], qemu_img: str = IMG) -> None:
    """Do what is done at first, when nothing has been merged yet."""
    if trio.run(partial(holds_data, pivot, ours, qemu_img=qemu_img)):
        require_unwritten(pivot, ours)
        trio.run(partial(merge_offline, pivot, ours, qemu_img=qemu_img))


@contextmanager
def opened(image: str) -> Iterator[None]:
    """A QEMU has it open, and its lock."""
    command = [IO, "-f", "qcow2", image]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "MiB" in process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def inodes(pivot: PivotPlan) -> frozenset[int]:
    return frozenset({os.stat(pivot.overlay.path).st_ino})


def test_what_the_guest_wrote_last_is_merged(pivot: PivotPlan) -> None:
    write(pivot.overlay.path, 2)
    merge(pivot, inodes(pivot))
    assert holds(pivot.overlay.backing, 2)


def test_an_empty_overlay_changes_nothing(pivot: PivotPlan) -> None:
    write(pivot.overlay.backing, 3)  # newer than the overlay, which does not matter then
    merge(pivot, inodes(pivot))
    assert holds(pivot.overlay.backing, 3)


def test_an_empty_overlay_does_not_matter_to_who_uses_the_base(pivot: PivotPlan) -> None:
    """A service manager has started the VM again, before anything was undone."""
    with opened(pivot.overlay.backing):
        merge(pivot, inodes(pivot))


def test_a_base_in_use_is_not_merged_into(pivot: PivotPlan) -> None:
    os.utime(pivot.overlay.backing, ns=(0, 0))
    write(pivot.overlay.path, 2)
    with opened(pivot.overlay.backing):
        os.utime(pivot.overlay.backing, ns=(0, 0))
        with pytest.raises(StoreError, match="Shut that down, and it is tried again"):
            merge(pivot, inodes(pivot))
    assert holds(pivot.overlay.path, 2)
    assert holds(pivot.overlay.backing, 1)


def test_an_overlay_in_use_is_no_leftover(pivot: PivotPlan) -> None:
    with opened(pivot.overlay.path), pytest.raises(StoreError, match="Shut that down"):
        merge(pivot, inodes(pivot))


def test_a_base_written_to_since_is_never_overwritten(pivot: PivotPlan) -> None:
    write(pivot.overlay.path, 2)
    before_ns = os.stat(pivot.overlay.path).st_mtime_ns - 1_000_000_000
    os.utime(pivot.overlay.path, ns=(before_ns, before_ns))  # clocks of files tick seldom
    write(pivot.overlay.backing, 3)
    with pytest.raises(StoreError, match="started from it again"):
        merge(pivot, inodes(pivot))
    assert holds(pivot.overlay.backing, 3)
    assert holds(pivot.overlay.path, 2)


def test_a_merge_that_was_cut_off_is_done_again(pivot: PivotPlan) -> None:
    """The image below is the newer one then, and it is known that it was us."""
    write(pivot.overlay.path, 2)
    merge(pivot, inodes(pivot))
    write(pivot.overlay.backing, 7)
    trio.run(partial(merge_offline, pivot, inodes(pivot), qemu_img=IMG))
    assert holds(pivot.overlay.backing, 2)


def test_a_merge_that_does_not_get_to_the_disk_has_failed(
    pivot: PivotPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it fails again, although the kernel then says that all is well."""
    write(pivot.overlay.path, 2)
    synced: list[str] = []

    def fail_once(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        if len(synced) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StoreError, match=r"cannot write .*web\.qcow2 to stable storage"):
        merge(pivot, inodes(pivot))
    assert synced == [pivot.overlay.backing]
    with pytest.raises(StoreError, match="could not be written to stable storage before"):
        trio.run(partial(merge_offline, pivot, inodes(pivot), qemu_img=IMG))
    assert holds(pivot.overlay.path, 2)


def test_a_file_that_is_not_ours_is_left_alone(pivot: PivotPlan) -> None:
    write(pivot.overlay.path, 2)
    merge(pivot, frozenset())
    assert holds(pivot.overlay.backing, 1)


def test_the_overlays_own_word_for_its_base_is_not_taken(
    pivot: PivotPlan, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.raw"
    foreign.write_bytes(bytes(SIZE_BYTES))
    rebase = [IMG, "rebase", "-u", "-b", str(foreign), "-F", "raw", pivot.overlay.path]
    subprocess.run(rebase, check=True)
    write(pivot.overlay.path, 2)
    merge(pivot, inodes(pivot))
    assert foreign.read_bytes() == bytes(SIZE_BYTES)
    assert holds(pivot.overlay.backing, 2)


def test_an_overlay_with_a_data_file_of_its_own_is_refused(pivot: PivotPlan) -> None:
    with open(pivot.overlay.path, "r+b") as file:
        file.seek(72)
        file.write((1 << 2).to_bytes(8, "big"))
    with pytest.raises(StoreError, match="altered"):
        merge(pivot, inodes(pivot))


def test_qemu_img_runs_as_the_images_owner(pivot: PivotPlan, tmp_path: Path) -> None:
    write(pivot.overlay.path, 2)
    owner = os.geteuid() or 65534  # only root can give files away
    for path in (pivot.overlay.path, pivot.overlay.backing):
        os.chown(path, owner, -1)
    seen, spy = tmp_path / "seen", tmp_path / "spy"
    seen.touch()
    seen.chmod(0o666)
    spy.write_text(f'#!/bin/sh\nid -u >> {seen}\nexec {IMG} "$@"\n')
    ours = [path for path in tmp_path.parents if path.is_relative_to(tempfile.gettempdir())]
    for place in (spy, tmp_path, *ours[:-1]):
        place.chmod(0o755)
    merge(pivot, inodes(pivot), qemu_img=str(spy))
    assert set(seen.read_text().split()) == {str(owner)}
    assert holds(pivot.overlay.backing, 2)


def test_an_overlay_on_a_device_is_known_by_what_it_covers(
    pivot: PivotPlan, tmp_path: Path
) -> None:
    """The name of a device gets another inode with each start of the host."""
    backing = pivot.overlay.backing
    with loop_device(tmp_path, size_mib=4) as device:
        make = [IMG, "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b"]
        subprocess.run([*make, f"{backing}-other", str(device), str(SIZE_BYTES)], check=True)
        overlay = pivot.overlay.model_copy(update={"path": str(device), "on_device": True})
        on_device = pivot.model_copy(update={"overlay": overlay})
        merge(on_device, frozenset({1}))
        subprocess.run([*make, backing, str(device), str(SIZE_BYTES)], check=True)
        write(device, 2)
        merge(on_device, frozenset())
        assert holds(backing, 1)
        merge(on_device, frozenset({1}))
    assert holds(backing, 2)
