"""The node that QEMU makes of an overlay: opened by the file's name, or handed over.

By name wherever QEMU finds this very file under it, for QEMU's sake: a node opened by
descriptor is called /dev/fdset/N, which is not what the header of the image above says. Such
an image QEMU names by all that it consists of, anew for every layer whenever it is asked: with
190 layers `query-block` takes 2 s then, in which the guest's devices stand still, and the pivot
50 ms. By name it is 40 ms and 3 ms (7.2, 10.0).
"""

import os
from typing import Any

from qsnapd.errors import CommandRefused
from qsnapd.image.files import reopen
from qsnapd.model.plan import PivotPlan, Place
from qsnapd.qmp.block import BlockdevAdd, BlockdevDel
from qsnapd.qmp.commands import AddFd
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.proc import open_files


async def add_overlay_node(vm: AttachedVm, plan: PivotPlan, overlay: int) -> None:
    """Make a node of the overlay, which is open as *overlay*, without the image below it yet.

    On success: the node `plan.overlay_node` is there and is this very file, whatever its
      name has come to mean meanwhile.
    On failure or cancellation: the node, and the descriptor set, may be there.
    Raises: CommandRefused: QEMU cannot use it either way. VmError.
    """
    by_name = plan.overlay.place is Place.NEW and await _is_added_by_name(vm, plan, overlay)
    if not by_name:
        await _add_by_descriptor(vm, plan, overlay)


async def _is_added_by_name(vm: AttachedVm, plan: PivotPlan, overlay: int) -> bool:
    path, pid = plan.overlay.path, vm.identity.pid
    if not await in_thread(_sees, pid, path, overlay):
        return False
    try:
        await vm.session.execute(BlockdevAdd(options=_options(plan, path)))
    except CommandRefused:  # QEMU's user may not open it, or something confines QEMU
        return False
    if _key(overlay) in await in_thread(open_files, pid):
        return True
    await vm.session.execute(BlockdevDel(node_name=plan.overlay_node))
    return False


def _sees(pid: int, path: str, overlay: int) -> bool:
    """Whether *path* is the overlay to process *pid* too, wherever its root is. Blocks."""
    try:
        status = os.stat(f"/proc/{pid}/root{path}", follow_symlinks=False)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == _key(overlay)


def _key(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


async def _add_by_descriptor(vm: AttachedVm, plan: PivotPlan, overlay: int) -> None:
    """The set holds one descriptor, O_RDWR, and no O_RDONLY one beside it.

    With both, QEMU would change to the second when the next overlay covers this one, while
    the first, still open in the set, kept its lock on the file; the next `cont` after a
    migration then fails with 'Failed to get shared "write" lock' (7.2, 10.0).
    """
    direct = os.O_DIRECT if plan.cache_direct else 0
    descriptor = reopen(overlay, os.O_RDWR | direct)
    try:
        command = AddFd(fdset_id=plan.fdset_id, opaque=plan.overlay.path)
        await vm.session.execute(command, descriptor=descriptor)
    finally:
        os.close(descriptor)
    await vm.session.execute(BlockdevAdd(options=_options(plan, f"/dev/fdset/{plan.fdset_id}")))


def _options(plan: PivotPlan, filename: str) -> dict[str, Any]:
    cache = {"direct": plan.cache_direct, "no-flush": plan.cache_no_flush}
    return {
        "driver": "qcow2",
        "node-name": plan.overlay_node,
        "discard": "unmap",
        "detect-zeroes": plan.detect_zeroes,
        "cache": cache,
        "backing": None,
        "file": {
            "driver": "host_device" if plan.overlay.on_device else "file",
            "node-name": plan.file_node,
            "filename": filename,
            "discard": "unmap",
            "cache": cache,
        },
    }
