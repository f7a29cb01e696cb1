"""The images that a running QEMU has under its disks, each with the node that means it."""

from dataclasses import dataclass

from qsnapd.errors import VmError
from qsnapd.model.snapshot import FileIdentity
from qsnapd.qmp.block import NodeStats, QueryNodeStats
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.disks import read_disks
from qsnapd.vm.proc import FileKey


@dataclass(frozen=True)
class LiveLayer:
    """One image of a disk."""

    node: str
    file: FileIdentity

    @property
    def key(self) -> FileKey:
        return self.file.device, self.file.inode


@dataclass(frozen=True)
class LiveDisk:
    """One writable disk."""

    target: str
    format: str
    """Of the active layer, as QEMU calls its driver."""
    layers: tuple[LiveLayer, ...]
    """Active layer first. Not empty."""
    bitmaps: tuple[str, ...] = ()
    """Names of the dirty bitmaps that are to last."""

    def find(self, key: FileKey) -> int | None:
        """How far down the image lies; None: it is none of this disk."""
        return next((n for n, layer in enumerate(self.layers) if layer.key == key), None)


async def read_live(session: QmpSession, pid: int) -> tuple[LiveDisk, ...]:
    """Ask QEMU which images lie under its writable disks.

    Raises: VmError: an image of one cannot be found from here, so that it is not known.
    """
    disks = await read_disks(session, pid)
    stats = await session.execute(QueryNodeStats())
    nodes = {chain[0]: chain for entry in stats if (chain := _nodes(entry))}
    live = []
    for disk in disks:
        if disk.left_out is not None:
            continue
        chain = nodes.get(disk.node, [])
        if not len(chain) == len(disk.chain) == disk.depth:
            raise VmError(
                f"disk {disk.target}: not all {disk.depth} images of it can be found from here "
                f"(the first is {disk.filename!r})"
            )
        layers = tuple(map(LiveLayer, chain, disk.chain))
        bitmaps = tuple(bitmap.name for bitmap in disk.bitmaps if bitmap.persistent)
        live.append(LiveDisk(disk.target, disk.format, layers, bitmaps))
    return tuple(live)


async def read_read_only(session: QmpSession, pid: int) -> dict[FileKey, str]:
    """The images that disks lie on, or over, which QEMU only reads; and their targets.

    Raises: VmError.
    """
    return {
        (file.device, file.inode): disk.target
        for disk in await read_disks(session, pid)
        if disk.left_out is not None
        for file in disk.chain
    }


def _nodes(entry: NodeStats) -> list[str]:
    names: list[str] = []
    layer: NodeStats | None = entry
    while layer is not None and layer.node_name is not None:
        names.append(layer.node_name)
        layer = layer.backing
    return names
