"""Is a stored snapshot what it was, and would it restore? Reads only; lists all it finds."""

import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import Blocked, ImageInvalid, QsnapError, StoreError
from qsnapd.image import digest
from qsnapd.model.snapshot import DiskLayer, Manifest, MemoryImage
from qsnapd.model.verification import Check, Outcome, Verification
from qsnapd.snapshot.chains import check_image, read_chain, wrong_with_chain
from qsnapd.snapshot.intact import check_memory, require_usable, wrong_files
from qsnapd.snapshot.restoring.differences import Difference
from qsnapd.snapshot.restoring.preflight import check_host_memory, free_memory_bytes
from qsnapd.snapshot.restoring.rehearsal import rehearse
from qsnapd.threads import SLOW


async def verify_snapshot(
    manifest: Manifest, *, deep: bool, directory: Path, qemu_img: str
) -> Verification:
    """Look at everything that belongs to the snapshot; *deep*: also load its memory.

    The VM, which may be running, is not touched. *directory*: see `rehearse`.
    Cancellation: at any time; nothing is left.
    Raises: WrongState: it is being deleted, and *deep* is asked for.
    """
    if deep:
        require_usable(manifest)
    checks = [check async for check in _all_checks(manifest, deep, directory, qemu_img)]
    return Verification(
        vm=manifest.vm,
        snapshot=manifest.name,
        deep=deep,
        sound=all(check.outcome is not Outcome.WRONG for check in checks),
        checks=tuple(checks),
    )


async def _all_checks(
    manifest: Manifest, deep: bool, directory: Path, qemu_img: str
) -> AsyncIterator[Check]:
    memory = manifest.memory
    if memory is not None:
        yield await trio.to_thread.run_sync(_check_memory, manifest, memory, limiter=SLOW)
        yield await trio.to_thread.run_sync(_check_hash, memory, limiter=SLOW)
    lost = await trio.to_thread.run_sync(lambda: list(wrong_files(manifest)))
    for disk in manifest.disks:
        for check in await _check_disk(disk, manifest, lost, qemu_img):
            yield check
    for left in manifest.left_out:
        detail = f"it is not part of the snapshot; it was on {left.frozen}"
        yield Check(what=f"disk {left.target}", outcome=Outcome.UNCHECKED, detail=detail)
    if deep and memory is not None:
        yield await _check_by_loading(manifest, directory, qemu_img)


def _check_memory(manifest: Manifest, memory: MemoryImage) -> Check:
    what = "memory image"
    try:
        verified = check_memory(manifest, memory, trio.from_thread.check_cancelled)
    except ImageInvalid as exc:
        return Check(what=what, outcome=Outcome.WRONG, detail=str(exc))
    except StoreError as exc:
        return Check(what=what, outcome=Outcome.UNCHECKED, detail=str(exc))
    if verified.unchecked:
        detail = f"only its beginning and end could be looked at: {verified.unchecked}"
        return Check(what=what, outcome=Outcome.UNCHECKED, detail=detail)
    detail = f"{memory.size_bytes} bytes, with {verified.pages} pages of RAM"
    return Check(what=what, outcome=Outcome.SOUND, detail=detail)


def _check_hash(memory: MemoryImage) -> Check:
    what = "memory SHA-256"
    if memory.sha256 is None:
        detail = "none was recorded when the snapshot was taken"
        return Check(what=what, outcome=Outcome.UNCHECKED, detail=detail)
    try:
        descriptor = os.open(memory.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        detail = f"{memory.path} cannot be opened: {exc.strerror}"
        return Check(what=what, outcome=Outcome.WRONG, detail=detail)
    try:
        found = digest.sha256(descriptor, trio.from_thread.check_cancelled)
    except (StoreError, ImageInvalid) as exc:
        return Check(what=what, outcome=Outcome.WRONG, detail=str(exc))
    finally:
        os.close(descriptor)
    if found != memory.sha256:
        detail = f"{memory.path} has other content than when it was saved: {found}"
        return Check(what=what, outcome=Outcome.WRONG, detail=detail)
    return Check(what=what, outcome=Outcome.SOUND, detail=found)


async def _check_disk(
    disk: DiskLayer, manifest: Manifest, lost: list[str], qemu_img: str
) -> list[Check]:
    what = f"disk {disk.target}"
    prefix = f"{what}: "
    if problems := [words for words in lost if words.startswith(prefix)]:
        return list(_wrong(what, problems))
    process = manifest.machine.process
    try:
        links = await read_chain(disk, process, qemu_img=qemu_img)
        problems = await trio.to_thread.run_sync(wrong_with_chain, disk, links)
        if damage := await check_image(disk, process, qemu_img=qemu_img):
            problems.append(damage)
    except ImageInvalid as exc:
        problems = [str(exc)]
    except StoreError as exc:
        return [Check(what=what, outcome=Outcome.UNCHECKED, detail=str(exc))]
    if problems:
        return list(_wrong(what, problems))
    images = f"{len(links)} images" if len(links) > 1 else "1 image"
    return [
        Check(what=what, outcome=Outcome.SOUND, detail=f"{images}, the newest is {disk.frozen}")
    ]


def _wrong(what: str, problems: list[str]) -> Iterator[Check]:
    for words in problems:
        detail = words.removeprefix(f"{what}: ")
        yield Check(what=what, outcome=Outcome.WRONG, detail=detail)


async def _check_by_loading(manifest: Manifest, directory: Path, qemu_img: str) -> Check:
    unchecked = partial(Check, what="restore", outcome=Outcome.UNCHECKED)
    wrong = partial(Check, what="restore", outcome=Outcome.WRONG)
    free_bytes = await trio.to_thread.run_sync(free_memory_bytes)
    for difference in check_host_memory(manifest, free_bytes):
        words = difference.now if isinstance(difference, Difference) else difference
        return unchecked(detail=words)
    try:
        detail = await rehearse(manifest, directory=directory, qemu_img=qemu_img)
    except Blocked as exc:
        return unchecked(detail=f"it cannot be tried beside the VM: {exc}")
    except StoreError as exc:
        return unchecked(detail=str(exc))
    except QsnapError as exc:
        return wrong(detail=str(exc))
    return Check(what="restore", outcome=Outcome.SOUND, detail=detail)
