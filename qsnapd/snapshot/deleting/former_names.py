"""What is to be known of images later: what they were called, who made them, who was on them.

A command line goes on naming what a QEMU was started on, wherever its content is by now.
"""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from qsnapd.errors import QsnapError
from qsnapd.image.files import identity
from qsnapd.model.plan import OverlayPlan
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.store.made import Made, MadeFile
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks

_log = logging.getLogger(__name__)


def with_former_names(manifest: Manifest, made: Made) -> Manifest:
    """The manifest of a snapshot just taken, knowing its disks by them, too.

    Names that its QEMU was not started on are dropped for good: nothing can be started any more
    on a file that is gone, and older snapshots know those of theirs.
    Blocks. Raises: StoreError.
    """
    argv = manifest.machine.process.argv
    made.keep_former(lambda path: may_name(argv, path))
    disks = tuple(_known(disk, made) for disk in manifest.disks)
    left_out = tuple(_known(disk, made) for disk in manifest.left_out)
    return manifest.model_copy(update={"disks": disks, "left_out": left_out})


def may_name(argv: Iterable[str], path: str) -> bool:
    """Whether a command line may name a file, in whatever way; pure."""
    name = os.path.basename(path)
    is_spelled_as_it_is = re.fullmatch(r"[\w.+@-]+", name, re.ASCII) is not None
    return not is_spelled_as_it_is or any(name in word for word in argv)


def _known(disk: DiskLayer, made: Made) -> DiskLayer:
    names = made.former(disk.chain)
    return disk.model_copy(update={"known_as": (*disk.known_as, *names)}) if names else disk


def note_made(
    made: Made, overlays: Iterable[OverlayPlan], created: Iterable[FileIdentity]
) -> None:
    """Note the overlays that are there now, and are of those that a job has *created*.

    Blocks. Raises: StoreError.
    """
    keys = {(file.device, file.inode) for file in created}
    found = [identity(Path(o.path)) for o in overlays if os.path.exists(o.path)]
    made.add(file for file in found if (file.device, file.inode) in keys)


async def note_disks(vm: AttachedVm, store: VmStore) -> None:
    """Note what the VM's disks are on, for when it is shut off. A failure is logged."""
    try:
        seen = [
            MadeFile(file=disk.chain[0], format="qcow2" if disk.format == "qcow2" else "raw")
            for disk in await read_disks(vm.session, vm.identity.pid)
            if disk.left_out is None and disk.chain
        ]
        await in_thread(store.made.saw, seen)
    except QsnapError as exc:
        _log.warning("VM %s: it is not noted where its disks are: %s", vm.name, exc)
