"""Commands as types: character devices (qapi/char.json), and who is connected to them."""

from pathlib import Path

from qsnapd.qmp.commands import Command, Each, QapiStruct

_NOBODY = "disconnected:"


class ChardevInfo(QapiStruct):
    """ChardevInfo."""

    label: str
    filename: str
    frontend_open: bool
    """Whether the guest has opened the port that it feeds."""

    def is_at(self, path: Path) -> bool:
        """Whether it serves the unix socket at *path*."""
        return self.filename.removeprefix(_NOBODY).split(",")[0] == f"unix:{path}"

    @property
    def is_taken(self) -> bool:
        """Whether a client is connected: QEMU serves one at a time, others wait in a queue."""
        return not self.filename.startswith(_NOBODY)


class QueryChardev(Command[list[ChardevInfo]]):
    name = "query-chardev"
    reply = Each[list[ChardevInfo]]
