"""What is asked of a guest agent, typed (QEMU's qga/qapi-schema.json).

The answers are the guest's: sizes are bounded, texts made fit for a terminal.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictInt, TypeAdapter

from qsnapd.errors import AgentRefused
from qsnapd.model.freeze import Filesystem
from qsnapd.qmp.agent import AgentSession
from qsnapd.qmp.commands import QapiStruct
from qsnapd.qmp.words import in_words

ANSWER_LIMIT_S = 5.0
THAW_ANSWER_LIMIT_S = 10.0

FREEZE = "guest-fsfreeze-freeze"

_Text = Annotated[str, AfterValidator(in_words)]
_Size = Annotated[StrictInt, Field(ge=0, lt=1 << 63)]
_COUNT = TypeAdapter(Annotated[StrictInt, Field(ge=0, le=1_000_000)])
_STATUS = TypeAdapter(Literal["thawed", "frozen"])


class _Disk(QapiStruct):
    """GuestDiskAddress."""

    dev: _Text = ""


class _FilesystemInfo(QapiStruct):
    """GuestFilesystemInfo."""

    name: _Text
    mountpoint: _Text
    type: _Text
    used_bytes: _Size | None = None
    total_bytes: _Size | None = None
    disk: tuple[_Disk, ...] = ()


_FILESYSTEMS = TypeAdapter(tuple[_FilesystemInfo, ...])


async def freeze(
    session: AgentSession, *, limit_s: float, mountpoints: Sequence[str] = ()
) -> int:
    """Freeze all file systems, or those at *mountpoints*; returns how many there were.

    Raises: AgentRefused: the agent has thawed by itself what it had frozen. AgentSilent.
    """
    if not mountpoints:
        return await session.execute(FREEZE, _COUNT.validate_python, limit_s=limit_s)
    return await session.execute(
        f"{FREEZE}-list",
        _COUNT.validate_python,
        limit_s=limit_s,
        arguments={"mountpoints": list(mountpoints)},
    )


async def thaw(session: AgentSession) -> int:
    """Thaw all file systems, whoever has frozen them; returns how many were.

    On success: none is frozen any more; it is none either that was not frozen.
    Raises: AgentRefused: something is frozen still. AgentSilent: unknown.
    """
    refusal: AgentRefused | None = None
    count = 0
    try:
        count = await session.execute(
            "guest-fsfreeze-thaw", _COUNT.validate_python, limit_s=THAW_ANSWER_LIMIT_S
        )
    except AgentRefused as exc:  # some agents refuse to thaw what is not frozen
        refusal = exc
    if await is_frozen(session):
        raise refusal or AgentRefused("the guest agent says that file systems are frozen still")
    return count


async def is_frozen(session: AgentSession) -> bool:
    """Whether the agent knows of file systems that it has frozen. Raises: as `execute`."""
    status = await session.execute(
        "guest-fsfreeze-status", _STATUS.validate_python, limit_s=ANSWER_LIMIT_S
    )
    return status == "frozen"


async def read_filesystems(session: AgentSession) -> tuple[Filesystem, ...]:
    """What is mounted in the guest. Raises: as `execute`."""
    found = await session.execute(
        "guest-get-fsinfo", _FILESYSTEMS.validate_python, limit_s=ANSWER_LIMIT_S
    )
    return tuple(
        Filesystem(
            mountpoint=one.mountpoint,
            name=one.name,
            type=one.type,
            devices=tuple(disk.dev for disk in one.disk if disk.dev),
            total_bytes=one.total_bytes,
            used_bytes=one.used_bytes,
        )
        for one in found
    )
