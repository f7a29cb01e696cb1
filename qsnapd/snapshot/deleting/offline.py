"""Merging images that no running QEMU has: by qemu-img, which takes their locks.

It runs as the owner of the image that was in a QEMU's hands, so that nothing this image may say
of other files opens more than its owner could. What is copied is on stable storage on return.
"""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import Effect, ImageInvalid, StoreError
from qsnapd.image.files import sync_image
from qsnapd.image.qcow2 import read_header
from qsnapd.model.deletion import Image, Merge
from qsnapd.threads import SLOW, in_thread
from qsnapd.vm.identity import is_still, key_of

MERGE_LIMIT_S = 24 * 3600.0
HEADER_LIMIT_S = 60.0


async def merge_images(merge: Merge, *, qemu_img: str) -> None:
    """Copy what has to be copied.

    On failure or cancellation: all images but the destination of a commit show what they did;
    that one must not be used alone. Doing it again is right.
    Raises: StoreError: it cannot be, e.g. because a QEMU has the images open.
    """
    if merge.kind == "commit":
        words = ["commit", "-q", "-d", "-f", "qcow2", merge.upper.path]
    else:
        words = ["rebase", "-q", "-f", "qcow2", *_onto(merge.below), merge.upper.path]
    what = f"{merge.source.path} cannot be merged into {merge.destination.path}"
    await in_thread(_require_pair, merge)
    await _run(qemu_img, words, merge.upper, what, MERGE_LIMIT_S)
    await sync(merge.destination)


async def put_onto(image: Image, below: Image | None, *, qemu_img: str) -> None:
    """Make *image* name *below* as the one below it, which shows the same. Raises: StoreError."""
    words = ["rebase", "-q", "-u", "-f", "qcow2", *_onto(below), image.path]
    what = f"{image.path} cannot be put onto {below.path if below else 'nothing'}"
    await _run(qemu_img, words, image, what, HEADER_LIMIT_S)
    await sync(image)


def lies_over(image: Image, below: Image) -> bool:
    """Whether the header of *image* names *below*. Blocks. Raises: StoreError."""
    found = below_of(image)
    return found is not None and found == key_of(below.path)


def below_of(image: Image) -> tuple[int, int] | None:
    """Which file the header of a qcow2 image names below it. Blocks. Raises: StoreError."""
    try:
        fd = os.open(image.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            name = read_header(fd).backing
        finally:
            os.close(fd)
    except (OSError, ImageInvalid) as exc:
        words = exc.strerror if isinstance(exc, OSError) else exc
        raise StoreError(f"cannot read {image.path}: {words}") from exc
    return key_of(os.path.join(os.path.dirname(image.path), name)) if name else None


def _onto(below: Image | None) -> list[str]:
    return ["-b", below.path, "-F", below.format] if below else ["-b", ""]


def _require_pair(merge: Merge) -> None:
    for image in (merge.upper, merge.lower):
        if not is_still(image.file):
            raise StoreError(f"{image.path} is missing or is another file than it was")
    if not lies_over(merge.upper, merge.lower):
        raise StoreError(f"{merge.upper.path} does not lie over {merge.lower.path} any more")


async def sync(image: Image) -> None:
    """Have the image on stable storage, whoever wrote to it. Raises: StoreError."""
    await trio.to_thread.run_sync(_sync, image, limiter=SLOW)


def _sync(image: Image) -> None:
    try:
        fd = os.open(image.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise StoreError(f"cannot open {image.path}: {exc.strerror}") from exc
    try:
        sync_image(fd)
    finally:
        os.close(fd)


async def _run(qemu_img: str, words: list[str], image: Image, what: str, limit_s: float) -> None:
    """Run qemu-img as the image's owner."""
    try:
        owner = await in_thread(Path(image.path).stat)
    except OSError as exc:
        raise StoreError(f"{what}: {image.path}: {exc.strerror}") from exc
    # Looked at once: else it might be another's by now, and be opened as that one.
    if owner.st_ino != image.file.inode and not stat.S_ISBLK(owner.st_mode):
        raise StoreError(f"{what}: {image.path} is another file than it was")
    identity: dict[str, Any] = {}
    if os.geteuid() == 0 and owner.st_uid != 0:
        identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    try:
        with trio.fail_after(limit_s):
            await trio.run_process(
                [qemu_img, *words],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                **identity,
            )
    except subprocess.CalledProcessError as exc:
        complaint = exc.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise StoreError(f"{what}: {complaint}") from exc
    except OSError as exc:
        raise StoreError(
            f"{what}: cannot run {qemu_img}: {exc.strerror} (it comes with qemu-utils; the "
            "config may name another)"
        ) from exc
    except trio.TooSlowError:
        raise StoreError(f"{what} within {limit_s:g} s", effect=Effect.PARTIAL) from None
