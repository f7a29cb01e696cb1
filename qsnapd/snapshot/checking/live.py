"""The block graph of a running QEMU, as far as it concerns snapshots."""

from collections.abc import Iterator
from dataclasses import dataclass

from qsnapd.errors import VmError
from qsnapd.qmp.block import ImageInfo, QueryBlock, QueryJobs, QueryNamedBlockNodes
from qsnapd.qmp.commands import QueryFdsets
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.disks import Disk, read_disks
from qsnapd.vm.identity import plain_name


@dataclass(frozen=True)
class Node:
    """One node that has a name."""

    name: str
    file: str
    """As QEMU names it."""


@dataclass(frozen=True)
class Handed:
    """A set of descriptors that qsnapd has handed over."""

    number: int
    path: str


@dataclass(frozen=True)
class Live:
    """One look at it."""

    disks: tuple[Disk, ...]
    nodes: tuple[Node, ...] = ()
    handed: tuple[Handed, ...] = ()
    in_chains: frozenset[str] = frozenset()
    """The files that the devices' chains consist of, as QEMU names them."""
    jobs: tuple[str, ...] = ()
    """Block jobs that are running."""


async def look_live(session: QmpSession, pid: int) -> Live:
    """Ask QEMU; nothing changes. Raises: VmError, and what QMP raises."""
    disks = await read_disks(session, pid)
    devices = await session.execute(QueryBlock())
    nodes = await session.execute(QueryNamedBlockNodes())
    fdsets = await session.execute(QueryFdsets())
    return Live(
        disks=disks,
        nodes=tuple(Node(node.node_name, _plain(node.image.filename)) for node in nodes),
        handed=tuple(
            Handed(fdset.fdset_id, path)
            for fdset in fdsets
            for path in {fd.opaque for fd in fdset.fds if fd.opaque and fd.opaque[0] == "/"}
        ),
        in_chains=frozenset(
            name for device in devices if device.inserted for name in _names(device.inserted.image)
        ),
        jobs=tuple(job.id for job in await session.execute(QueryJobs())),
    )


def _names(image: ImageInfo | None) -> Iterator[str]:
    while image is not None:
        yield _plain(image.filename)
        image = image.backing_image


def _plain(name: str) -> str:
    try:
        return plain_name(name)
    except VmError:
        return name
