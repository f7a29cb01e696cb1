"""Disks that a snapshot leaves out, when a VM is put back to it: on what, and at what price.

They go on from the image that they were on, as it is by now. Nobody may write to that if a
snapshot has frozen it since.
"""

from collections.abc import Iterable, Iterator, Sequence

from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.snapshot.restoring.differences import Difference
from qsnapd.vm.disks import Disk
from qsnapd.vm.identity import is_still, key_of


def compare_left_out(
    manifest: Manifest, others: Iterable[Manifest], present: Sequence[Disk], *, loads: bool
) -> Iterator[Difference | str]:
    """What restoring means for the disks that are not part of the snapshot. Blocks.

    *others*: all snapshots of the VM. *present*: the disks that it has right now, if it runs.
    *loads*: whether the memory is loaded, which knows what was on them then.
    """
    others = tuple(others)
    for disk in manifest.left_out:
        what = f"disk {disk.target}"
        if key_of(disk.frozen) is None:
            yield Difference(what, "", f"{disk.frozen}, the image it was on, is missing", False)
        elif user := _frozen_by(disk, others) or _covered_by(disk, present):
            yield Difference(
                what,
                "",
                f"it was left out, and {disk.frozen}, the image it was on, {user} by now: it must "
                "not be written to",
                False,
            )
        elif disk.target in manifest.manual_disks:
            yield Difference(
                what,
                "",
                f"{disk.frozen} was left to its storage's own snapshot: put it back to that, then "
                "--force",
                True,
            )
        elif not (disk.chain and is_still(disk.chain[0])):
            words = f"it was left out, and {disk.frozen} is another file than it was on then"
            yield Difference(what, "", words, True)
        elif loads:
            yield Difference(
                what,
                "",
                f"it was left out: what {disk.frozen} holds now is newer than the guest's memory, "
                "and the guest may destroy it",
                True,
            )
        else:
            yield f"{what} was left out: it stays as it is, on {disk.frozen}"


def _frozen_by(disk: DiskLayer, others: Sequence[Manifest]) -> str | None:
    for other in others:
        if any(_holds(layer.chain, disk.frozen) for layer in other.disks):
            return f"is a frozen image of snapshot {other.name}"
    return None


def _covered_by(disk: DiskLayer, present: Sequence[Disk]) -> str | None:
    for now in present:
        if _holds(now.chain[1:], disk.frozen):
            return f"lies below {now.path}"
    return None


def _holds(chain: Iterable[FileIdentity], path: str) -> bool:
    key = key_of(path)
    return any(path == file.path or key == key_of(file.path) for file in chain)


def is_left_out_of(disk: Disk, manifest: Manifest) -> bool:
    """Whether *disk*, which the VM has now, is one that the snapshot leaves out."""
    return disk.left_out is None and any(
        disk.target == left.target for left in manifest.left_out
    )
