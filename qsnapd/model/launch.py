"""How a VM would be started from a snapshot, for people and their tools."""

from pydantic import NonNegativeInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.plan import Loading
from qsnapd.model.snapshot import AbsolutePath


class NewOverlay(Frozen):
    """A qcow2 file to make before."""

    target: str
    path: AbsolutePath
    backing: AbsolutePath
    backing_format: str


class LaunchInfo(Frozen):
    """A command line, and what has to be there for it. Nothing of it has been done."""

    vm: VmName
    snapshot: SnapshotName
    executable: AbsolutePath
    argv: tuple[str, ...]
    """With the name it is called by in front."""
    command_line: str
    """The same, quoted for a shell."""
    cwd: AbsolutePath
    uid: NonNegativeInt
    gid: NonNegativeInt
    environment: dict[str, str]
    overlays: tuple[NewOverlay, ...]
    loading: Loading | None
    """What to load then; None: QEMU boots from its disks."""
