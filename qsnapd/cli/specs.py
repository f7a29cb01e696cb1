"""virsh's words for the memory and the disks of a new snapshot, and its XML of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import click

from qsnapd.xml.escaping import attribute, escaped
from qsnapd.xml.meaning import disk_meaning, memory_meaning

_TYPES = ("file", "block")


@dataclass(frozen=True)
class MemSpec:
    """`[file=]PATH[,snapshot=no|external]`"""

    snapshot: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, spec: str) -> "MemSpec":
        """Raises: UsageError: it is no memspec."""
        words = [f"file={word}" if word.startswith("/") else word for word in _split(spec)]
        values = _values("memspec", spec, words, known=("file", "snapshot"))
        return cls(**values)

    def request(self) -> dict[str, object]:
        """The fields of a CreateRequest. Raises: BadRequest: it cannot be."""
        return memory_meaning(self.snapshot, self.file)

    def xml(self) -> list[str]:
        return [f"<memory{attribute('snapshot', self.snapshot)}{attribute('file', self.file)}/>"]


@dataclass(frozen=True)
class DiskSpec:
    """`DISK[,snapshot=no|external|manual][,driver=qcow2][,stype=file|block][,file=PATH]`"""

    name: str
    snapshot: str | None = None
    driver: str | None = None
    stype: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, spec: str) -> "DiskSpec":
        """Raises: UsageError: it is no diskspec."""
        name, *words = _split(spec)
        known = ("snapshot", "driver", "stype", "file")
        values = _values("diskspec", spec, words, known)
        if values.get("stype", "file") not in _TYPES:
            raise click.UsageError(
                f"Unknown storage type: '{values['stype']}'; unable to parse diskspec: {spec}"
            )
        return cls(name, **values)

    def request(self) -> dict[str, object]:
        """A DiskRequest. Raises: BadRequest: it cannot be."""
        return disk_meaning(
            *(self.name,),
            mode=self.snapshot,
            kind=self.stype,
            driver=self.driver,
            file=self.file,
        )

    def xml(self) -> list[str]:
        said = attribute("snapshot", self.snapshot) + attribute("type", self.stype)
        start = f"<disk{attribute('name', self.name)}{said}"
        if self.driver is None and self.file is None:
            return [f"{start}/>"]
        inside = []
        if self.driver is not None:
            inside.append(f"  <driver{attribute('type', self.driver)}/>")
        if self.file is not None:
            key = "dev" if self.stype == "block" else "file"
            inside.append(f"  <source{attribute(key, self.file)}/>")
        return [f"{start}>", *inside, "</disk>"]


def request_xml(
    name: str | None, description: str | None, memory: MemSpec | None, disks: Sequence[DiskSpec]
) -> str:
    """The `<domainsnapshot>` that asks for this, as virsh writes it."""
    lines = []
    for tag, words in (("name", name), ("description", description)):
        if words is not None:
            lines.append(f"<{tag}>{escaped(words)}</{tag}>")
    lines += memory.xml() if memory is not None else []
    if disks:
        inside = [f"  {line}" for disk in disks for line in disk.xml()]
        lines += ["<disks>", *inside, "</disks>"]
    return "\n".join(["<domainsnapshot>", *(f"  {line}" for line in lines), "</domainsnapshot>\n"])


def _split(spec: str) -> list[str]:
    """Split at commas; a doubled one stands for itself."""
    return [part.replace("\0", ",") for part in spec.replace(",,", "\0").split(",")]


def _values(what: str, spec: str, parts: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in known or key in values:
            raise click.UsageError(f"unable to parse {what}: {spec}")
        values[key] = value
    return values
