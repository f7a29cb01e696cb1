"""New qcow2 files over existing images, and the nodes that QEMU makes of them."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import StoreError
from qsnapd.image.files import create_exclusive, publish, reopen, sync_file
from qsnapd.model.plan import OverlayPlan, PivotPlan
from qsnapd.qmp.block import BlockdevAdd
from qsnapd.qmp.commands import AddFd
from qsnapd.qmp.session import QmpSession

QEMU_IMG_LIMIT_S = 60.0


async def make_overlay(plan: OverlayPlan, *, qemu_img: str) -> int:
    """Create the overlay's file under its partial name, complete and synced.

    It belongs to whom the image below belongs, mode 0600. Returns a descriptor for the
    caller to close: its folder may be another user's, so that only the descriptor, never
    again the name, surely means this file.

    On failure: the partial file may exist; its name carries the job's token.
    Raises: TargetRefused: it cannot be created there. StoreError: qemu-img failed.
    """
    descriptor = await trio.to_thread.run_sync(create_exclusive, Path(plan.partial))
    try:
        await fill_overlay(plan, descriptor, qemu_img=qemu_img)
        await trio.to_thread.run_sync(sync_file, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def fill_overlay(plan: OverlayPlan, descriptor: int, *, qemu_img: str) -> None:
    """Make an overlay of an empty file. Raises: StoreError: qemu-img failed."""
    # -u: QEMU holds the image below open and locked, and we know its size.
    command = [qemu_img, "create", "-q", "-f", "qcow2", "-u"]
    command += ["-F", plan.backing_format, "-b", plan.backing]
    if options := _options(plan):
        command += ["-o", options]
    command += [f"/proc/self/fd/{descriptor}", str(plan.virtual_size_bytes)]
    try:
        if os.geteuid() == 0:
            owner = os.stat(plan.backing)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        with trio.fail_after(QEMU_IMG_LIMIT_S):
            await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, pass_fds=(descriptor,)
            )
    except FileNotFoundError as exc:
        raise StoreError(
            f"cannot make {plan.path}: {exc.filename} is missing (qemu-img comes with qemu-utils; "
            "the config may name another)"
        ) from exc
    except subprocess.CalledProcessError as exc:
        words = exc.stderr.decode(errors="replace").strip()
        raise StoreError(f"qemu-img could not create {plan.path}: {words}") from exc
    except trio.TooSlowError:
        raise StoreError(
            f"qemu-img did not create {plan.path} within {QEMU_IMG_LIMIT_S:g} s"
        ) from None
    except OSError as exc:
        raise StoreError(f"cannot create {plan.path}: {exc.strerror}") from exc


def _options(plan: OverlayPlan) -> str:
    options = []
    if plan.cluster_size_bytes:
        options.append(f"cluster_size={plan.cluster_size_bytes}")
    if plan.extended_l2:
        options.append("extended_l2=on")
    return ",".join(options)


async def publish_overlays(plans: Sequence[OverlayPlan]) -> None:
    """Give finished overlays their names, never in place of another file.

    Raises: TargetRefused: a file of that name exists.
    """
    for plan in plans:
        await trio.to_thread.run_sync(publish, Path(plan.partial), Path(plan.path))


async def add_overlay_node(session: QmpSession, plan: PivotPlan, overlay: int) -> None:
    """Hand the overlay to QEMU and make a node of it, without the image below it yet.

    The set holds one descriptor, O_RDWR, and no O_RDONLY one beside it. With both, QEMU
    would change to the second when the next overlay covers this one, while the first,
    still open in the set, kept its lock on the file; the next `cont` after a migration
    then fails with 'Failed to get shared "write" lock' (7.2, 10.0).
    """
    direct = os.O_DIRECT if plan.cache_direct else 0
    descriptor = reopen(overlay, os.O_RDWR | direct)
    try:
        command = AddFd(fdset_id=plan.fdset_id, opaque=plan.overlay.path)
        await session.execute(command, descriptor=descriptor)
    finally:
        os.close(descriptor)
    await session.execute(BlockdevAdd(options=_node_options(plan)))


def _node_options(plan: PivotPlan) -> dict[str, Any]:
    cache = {"direct": plan.cache_direct, "no-flush": plan.cache_no_flush}
    return {
        "driver": "qcow2",
        "node-name": plan.overlay_node,
        "discard": "unmap",
        "detect-zeroes": plan.detect_zeroes,
        "cache": cache,
        "backing": None,
        "file": {
            "driver": "file",
            "node-name": plan.file_node,
            "filename": f"/dev/fdset/{plan.fdset_id}",
            "discard": "unmap",
            "cache": cache,
        },
    }


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
