"""Whether a VM's QEMU may open the memory image that its RAM is to map."""

import os
from pathlib import Path

from qsnapd.model.snapshot import Process
from qsnapd.vm.access import READ, SEARCH, Want, refusals
from qsnapd.vm.ram_options import CannotMap


def require_readable(path: str, process: Process) -> None:
    """Return if *process* may read the file *path*, and search every folder on the way. Blocks.

    Raises: CannotMap: no, and which file or folder is why.
    """
    real = Path(os.path.realpath(path))
    wants = [
        *(Want(str(folder), SEARCH) for folder in reversed(real.parents)),
        Want(str(real), READ),
    ]
    for want, refusal in zip(wants, refusals(process, wants), strict=True):
        if refusal is not None:
            doing = "read" if want.mode == READ else "search"
            raise CannotMap(
                f"QEMU, as user {process.uid}, cannot {doing} {want.path}: {refusal}"
            )
