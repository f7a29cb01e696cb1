"""Are a snapshot's own files still there, the same ones, and whole?"""

import os
from collections.abc import Callable, Iterator

import trio

from qsnapd.errors import ImageInvalid, WrongState
from qsnapd.image.savevm import Verified
from qsnapd.model.snapshot import Manifest, MemoryImage
from qsnapd.snapshot.taking.finish import verify_image
from qsnapd.vm.identity import is_still


def require_usable(manifest: Manifest) -> None:
    """Refuse to restore or to copy a snapshot whose images are being merged.

    Raises: WrongState.
    """
    if manifest.deleting:
        raise WrongState(
            f"snapshot {manifest.name} is being deleted, or that was broken off: its disks hold "
            f"newer data already. Delete it again (qsnapctl snapshot-delete {manifest.vm} "
            f"{manifest.name}) to finish that"
        )


def check_snapshot(manifest: Manifest, *, memory: bool = True) -> Verified | None:
    """Refuse a snapshot whose own files are not what they were.

    Runs in a thread of trio's, and stops when its caller is cancelled. Returns what was found
    out about the memory image; None if there is none, or *memory* does not matter.
    Raises: ImageInvalid: a file is missing, was replaced or is damaged.
    """
    for wrong in wrong_files(manifest):
        raise ImageInvalid(wrong)
    if manifest.memory is None or not memory:
        return None
    return check_memory(manifest, manifest.memory, trio.from_thread.check_cancelled)


def wrong_files(manifest: Manifest) -> Iterator[str]:
    """The files of disks that are missing or others than they were, one sentence each."""
    for disk in manifest.disks:
        for file in disk.chain:
            if not is_still(file):
                yield (
                    f"disk {disk.target}: {file.path} is missing or is another file than when "
                    f"snapshot {manifest.name} was taken"
                )


def check_memory(
    manifest: Manifest, memory: MemoryImage, check_cancelled: Callable[[], object]
) -> Verified:
    """Check the memory image's structure. Blocks. Raises: ImageInvalid, StoreError."""
    try:
        descriptor = os.open(memory.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageInvalid(
            f"the memory image {memory.path} cannot be opened: {exc.strerror}"
        ) from exc
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != memory.size_bytes:
            raise ImageInvalid(
                f"the memory image {memory.path} has {size_bytes} bytes, it was saved with "
                f"{memory.size_bytes}"
            )
        if manifest.image_format is None or manifest.strategy is None:
            raise ImageInvalid(f"the manifest of {manifest.name} does not say how it was saved")
        return verify_image(
            descriptor,
            manifest.image_format,
            manifest.strategy,
            manifest.machine.ram_blocks,
            check_cancelled,
            holes_are_zero=manifest.is_mappable,
        )
    finally:
        os.close(descriptor)
