"""Calls about the file systems in a guest; its agent answers them."""

from typing import Annotated

from pydantic import Field, NonNegativeInt

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More
from qsnapd.model.base import Frozen
from qsnapd.model.freeze import Filesystem
from qsnapd.model.names import VmName

MOUNTPOINTS_LIMIT = 100


class FilesystemCountReply(Frozen):
    filesystems: NonNegativeInt


class FilesystemsReply(Frozen):
    filesystems: tuple[Filesystem, ...]


class FreezeFilesystems(Method):
    """Freeze the guest's file systems, until somebody calls ThawFilesystems.

    Nobody else thaws them. If it fails, or the client of a call with "more" leaves before the
    reply, what was frozen is thawed.
    """

    role = Role.OPERATOR
    vm: VmName
    mountpoints: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...],
        Field(max_length=MOUNTPOINTS_LIMIT),
    ] = ()
    """Only those mounted there; by default all."""

    async def answer(self, host: Host, more: More | None) -> FilesystemCountReply:
        count = await host.freeze_filesystems(self.vm, self.mountpoints)
        return FilesystemCountReply(filesystems=count)


class ThawFilesystems(Method):
    """Thaw the guest's file systems, whoever froze them; also if none is frozen."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> FilesystemCountReply:
        return FilesystemCountReply(filesystems=await host.thaw_filesystems(self.vm))


class ListFilesystems(Method):
    """List what is mounted in the guest. It is the guest that says so."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> FilesystemsReply:
        return FilesystemsReply(filesystems=await host.filesystems(self.vm))
