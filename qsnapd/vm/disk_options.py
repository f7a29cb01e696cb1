"""Where a command line names the images of disks, and how to name an overlay there instead.

The node a device uses keeps its name and its place; only what it reads and writes changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Fields, Option, escaped

# Options that are short for a -drive: what they add to "file=...".
_SHORTHANDS = {
    "": "index=0,media=disk",  # a bare word is QEMU's -hda
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "mtdblock": "if=mtd",
    "pflash": "if=pflash",
    "sd": "if=sd",
}
_FORMATS = frozenset({"qcow2", "raw", None})
"""Images an overlay can replace; None: a -drive that leaves it to QEMU to find out."""
_PROTOCOLS = frozenset({"file", "host_device", None})
_OF_THE_PROTOCOL = (
    "filename",
    "aio",
    "aio-max-batch",
    "drop-cache",
    "locking",
    "pr-manager",
    "x-check-cache-dropped",
)
"""Members that only a protocol node understands (qapi/block-core.json, BlockdevOptionsFile)."""


@dataclass(frozen=True)
class Mention:
    """One place where the command line names a writable image."""

    index: int
    """Which option."""
    key: str
    """Which of its fields; empty: the option's whole value."""
    filename: str


class DiskOptions:
    """A command line whose images can be replaced."""

    def __init__(self, options: Sequence[Option]) -> None:
        self._options = list(options)
        self._fields = {
            index: _parse(option)
            for index, option in enumerate(options)
            if option.name in ("blockdev", "drive")
        }
        self._changed: set[int] = set()

    def options(self) -> list[Option]:
        """The command line as it is now; what did not change is word for word as it was."""
        return [
            Option(option.name, str(self._fields[index]), option.dashes)
            if index in self._changed
            else option
            for index, option in enumerate(self._options)
        ]

    def mentions(self) -> Iterator[Mention]:
        """All images, except those opened read-only and CD-ROMs."""
        for index, option in enumerate(self._options):
            if option.name in _SHORTHANDS and option.value is not None:
                yield Mention(index, "", option.value.removeprefix("file:"))
        for index, fields in self._fields.items():
            for key, value in fields.items():
                if not isinstance(value, str) or _is_read_only(fields, key):
                    continue
                if key == "filename" or key.endswith(".filename"):
                    yield Mention(index, key, value)
                elif key == "file" and self._options[index].name == "drive":
                    yield Mention(index, key, value.removeprefix("file:"))

    def replace(self, mention: Mention, overlay: str) -> None:
        """Put the qcow2 file *overlay* where *mention* names its image.

        Raises: Blocked: the option says something about the image that an overlay over it
          cannot take on.
        """
        option = self._options[mention.index]
        if option.name in _SHORTHANDS:
            drive = f"file={escaped(overlay)},format=qcow2,{_SHORTHANDS[option.name]}"
            self._options[mention.index] = Option("drive", drive)
            return
        fields = self._fields[mention.index]
        self._changed.add(mention.index)
        if fields.is_on("snapshot"):
            raise Blocked(f"{option}: with snapshot=on the disk's writes are thrown away")
        if mention.key == "file":
            self._make_qcow2(mention.index, "")
            fields["file"] = overlay
            return
        protocol = mention.key.removesuffix("filename")
        if fields.get(f"{protocol}driver") not in _PROTOCOLS:
            raise Blocked(f"{option}: {fields[f'{protocol}driver']} is no plain file")
        above = self._node_above(mention.index, protocol)
        if above is None:
            self._wrap(mention.index, protocol)
            protocol += "file."
        else:
            self._make_qcow2(*above)
        fields[f"{protocol}driver"] = "file"  # whatever it was: the overlay is no device
        fields[f"{protocol}filename"] = overlay

    def _node_above(self, index: int, protocol: str) -> tuple[int, str] | None:
        """Option and prefix of the format node over a protocol node, if there is one."""
        fields = self._fields[index]
        if protocol:
            if set(protocol.split(".")) != {"file", ""}:
                raise Blocked(
                    f"{self._options[index]}: names the disk's image as {protocol.rstrip('.')!r}, "
                    "where qsnapd cannot put an overlay"
                )
            return index, protocol.removesuffix("file.")
        name = fields.get("node-name")
        users = [
            (other, key.removesuffix("file"))
            for other, others in self._fields.items()
            for key, value in others.items()
            if value == name
            and name is not None
            and (key == "file" or key.endswith(".file"))
            and self._options[other].name == "blockdev"
        ]
        if len(users) > 1:
            raise Blocked(f"{self._options[index]}: several nodes use {name!r}")
        return users[0] if users else None

    def _make_qcow2(self, index: int, node: str) -> None:
        """Turn the format node at prefix *node* into the overlay's."""
        fields, option = self._fields[index], self._options[index]
        self._changed.add(index)
        key = f"{node}driver"
        if option.name == "drive" and key not in fields:
            key = f"{node}format"
        # -drive takes file=... for a protocol's own file name, too.
        known = _FORMATS | _PROTOCOLS if option.name == "drive" and not node else _FORMATS
        if fields.get(key) not in known:
            raise Blocked(f"{option}: qsnapd cannot put an overlay over {fields[key]!r}")
        for name in fields:
            if name in (f"{node}offset", f"{node}size"):
                raise Blocked(f"{option}: the disk is a part of its file ({name}=), not all of it")
            if name.startswith(f"{node}encrypt"):
                raise Blocked(f"{option}: the image is encrypted, and no overlay could be opened")
        self._refuse_if_backing(index, node)
        fields[key] = "qcow2"
        # The overlay's header says what lies below it, and it has no data file of its own.
        fields.drop(f"{node}backing")
        fields.drop(f"{node}data-file")

    def _wrap(self, index: int, node: str) -> None:
        """Put a qcow2 node in the place of a protocol node that served as a raw disk."""
        fields = self._fields[index]
        self._refuse_if_backing(index, node)
        for name in _OF_THE_PROTOCOL:
            fields.rename(f"{node}{name}", f"{node}file.{name}")
        fields[f"{node}driver"] = "qcow2"

    def _refuse_if_backing(self, index: int, node: str) -> None:
        name = self._fields[index].get(f"{node}node-name")
        for fields in self._fields.values():
            for key, value in fields.items():
                if name and value == name and (key == "backing" or key.endswith(".backing")):
                    raise Blocked(
                        f"{self._options[index]}: other nodes use {name!r} as their backing image, "
                        "and the disk's own image is not on the command line"
                    )


def _parse(option: Option) -> Fields:
    try:
        return Fields.parse(option.value or "", first_key="driver")
    except ValueError as exc:  # QEMU's JSON also knows 'single quotes'
        raise Blocked(f"{option}: qsnapd cannot read this JSON: {exc}") from None


def _is_read_only(fields: Fields, key: str) -> bool:
    parents = key.split(".")[:-1]
    prefixes = [".".join([*parents[:depth], ""]) for depth in range(len(parents) + 1)]
    return fields.get("media") == "cdrom" or any(
        fields.is_on(f"{prefix}{name}") for prefix in prefixes for name in ("read-only", "readonly")
    )
