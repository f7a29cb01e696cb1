"""New qcow2 files over existing images, and the transaction that moves disks to them."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import StoreError, TargetRefused
from qsnapd.image.files import create_exclusive, publish, sync_file
from qsnapd.model.plan import OverlayPlan, PivotPlan, Place
from qsnapd.snapshot.taking.targets import open_given
from qsnapd.threads import in_thread

QEMU_IMG_LIMIT_S = 60.0


async def make_overlay(plan: OverlayPlan, *, qemu_img: str) -> int:
    """Create the overlay's file under its partial name, complete and synced.

    It belongs to whom the image below belongs, mode 0600. Returns a descriptor for the
    caller to close: its folder may be another user's, so that only the descriptor, never
    again the name, surely means this file.

    On failure: the partial file may exist; its name carries the job's token.
    Raises: TargetRefused: it cannot be created there. StoreError: qemu-img failed.
    """
    descriptor = await in_thread(open_overlay, plan)
    try:
        await complete_overlay(plan, descriptor, qemu_img=qemu_img)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_overlay(plan: OverlayPlan) -> int:
    """Create the overlay's file, empty, or open what somebody has given for it. Blocks.

    Returns a descriptor for the caller to close. Raises: TargetRefused.
    """
    if plan.place is Place.NEW:
        return create_exclusive(Path(plan.partial))
    return open_given(plan)


async def complete_overlay(plan: OverlayPlan, descriptor: int, *, qemu_img: str) -> None:
    """Make an overlay of what `open_overlay` has opened; synced on return.

    Raises: StoreError: qemu-img failed. TargetRefused: a finished one holds data already.
    """
    if plan.place is Place.READY:
        await _require_blank(plan, descriptor, qemu_img=qemu_img)
    else:
        await fill_overlay(plan, descriptor, qemu_img=qemu_img)
        await in_thread(sync_file, descriptor)


async def _require_blank(plan: OverlayPlan, descriptor: int, *, qemu_img: str) -> None:
    """Refuse an overlay in which the guest would find what it has never written."""
    image = {
        "driver": "qcow2",
        "file": {
            "driver": "host_device" if plan.on_device else "file",
            "filename": f"/proc/self/fd/{descriptor}",
        },
        "backing": None,
    }
    command = [qemu_img, "map", "--output=json", f"json:{json.dumps(image)}"]
    owner = os.fstat(descriptor)
    ids: dict[str, Any] = {}
    if os.geteuid() == 0 and owner.st_uid != 0:  # who made it could make qemu-img read anything
        ids = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    printed = await _run(plan, command, "look into", descriptor, ids)
    if any(extent.get("present", extent["data"]) for extent in json.loads(printed)):
        raise TargetRefused(
            f"disk {plan.target}: {plan.path} holds data already, which the guest would find on "
            "its disk all of a sudden: make an empty overlay"
        )


async def fill_overlay(plan: OverlayPlan, descriptor: int, *, qemu_img: str) -> None:
    """Make an overlay of an empty file. Raises: StoreError: qemu-img failed."""
    # -u: QEMU holds the image below open and locked, and we know its size.
    command = [qemu_img, "create", "-q", "-f", "qcow2", "-u"]
    command += ["-F", plan.backing_format, "-b", plan.backing]
    if options := _options(plan):
        command += ["-o", options]
    command += [f"/proc/self/fd/{descriptor}", str(plan.virtual_size_bytes)]
    try:
        if os.geteuid() == 0 and plan.place is Place.NEW:
            owner = os.stat(plan.backing)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError as exc:
        raise StoreError(f"cannot create {plan.path}: {exc.strerror}") from exc
    await _run(plan, command, "create", descriptor, {})


async def _run(
    plan: OverlayPlan, command: list[str], verb: str, descriptor: int, ids: dict[str, Any]
) -> bytes:
    """Run qemu-img on the overlay; what it printed. Raises: StoreError."""
    try:
        with trio.fail_after(QEMU_IMG_LIMIT_S):
            done = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, pass_fds=(descriptor,), **ids
            )
    except FileNotFoundError as exc:
        raise StoreError(
            f"cannot {verb} {plan.path}: {exc.filename} is missing (qemu-img comes with "
            "qemu-utils; the config may name another)"
        ) from exc
    except subprocess.CalledProcessError as exc:
        words = exc.stderr.decode(errors="replace").strip()
        raise StoreError(f"qemu-img could not {verb} {plan.path}: {words}") from exc
    except trio.TooSlowError:
        raise StoreError(
            f"qemu-img did not {verb} {plan.path} within {QEMU_IMG_LIMIT_S:g} s"
        ) from None
    except OSError as exc:
        raise StoreError(f"cannot {verb} {plan.path}: {exc.strerror}") from exc
    return bytes(done.stdout)


def _options(plan: OverlayPlan) -> str:
    options = []
    if plan.cluster_size_bytes:
        options.append(f"cluster_size={plan.cluster_size_bytes}")
    if plan.extended_l2:
        options.append("extended_l2=on")
    return ",".join(options)


async def publish_overlays(plans: Sequence[OverlayPlan]) -> None:
    """Give finished overlays their names, never in place of another file.

    Those that are where somebody has put them have theirs already.

    Raises: TargetRefused: a file of that name exists.
    """
    for plan in plans:
        if plan.place is not Place.NEW:
            continue
        await in_thread(publish, Path(plan.partial), Path(plan.path))


def pivot_actions(plans: Sequence[PivotPlan]) -> list[dict[str, Any]]:
    """The transaction that moves all disks at once, with the bitmaps that go on in overlays."""
    actions: list[dict[str, Any]] = []
    for plan in plans:
        actions.extend(
            {
                "type": "block-dirty-bitmap-add",
                "data": {
                    "node": plan.overlay_node,
                    "name": bitmap.name,
                    "granularity": bitmap.granularity_bytes,
                    "persistent": True,
                },
            }
            for bitmap in plan.bitmaps
        )
        actions.append(
            {
                "type": "blockdev-snapshot",
                "data": {"node": plan.node, "overlay": plan.overlay_node},
            }
        )
    return actions
