"""The files that a command line names, and what QEMU does with them.

What is not known here is not checked; QEMU itself says so then, when it starts.
"""

import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qsnapd.vm.argv import Fields, Option


class Use(StrEnum):
    """What QEMU does with a file; the value is for sentences."""

    READ = "reads"
    WRITE = "writes"
    LISTEN = "listens at"
    CONNECT = "connects to"
    SEARCH = "looks into"
    KEEP_RAM = "keeps RAM in"


@dataclass(frozen=True)
class NamedFile:
    """A file that an option names."""

    option: Option
    path: str
    """Absolute."""
    use: Use


_WHOLE = {
    "bios": Use.READ,
    "cdrom": Use.READ,
    "D": Use.WRITE,
    "dtb": Use.READ,
    "initrd": Use.READ,
    "kernel": Use.READ,
    "L": Use.SEARCH,
    "mem-path": Use.KEEP_RAM,
    "pidfile": Use.WRITE,
}
"""Options whose value is a path and nothing else."""
_PARTS = {
    "acpitable": {"file": Use.READ, "data": Use.READ},
    "chardev": {"logfile": Use.WRITE},
    "device": {"romfile": Use.READ},
    "fsdev": {"path": Use.SEARCH},
    "fw_cfg": {"file": Use.READ},
    "netdev": {"path": Use.CONNECT},
    "object": {
        "dir": Use.SEARCH,
        "file": Use.READ,
        "filename": Use.READ,
        "mem-path": Use.KEEP_RAM,
    },
    "option-rom": {"romfile": Use.READ},
    "smbios": {"file": Use.READ},
    "tpmdev": {"path": Use.READ},
    "virtfs": {"path": Use.SEARCH},
}
"""Parts of an option's value that are paths."""
_FIRST_KEYS = {
    "acpitable": "sig",
    "chardev": "backend",
    "device": "driver",
    "fsdev": "fsdriver",
    "fw_cfg": "name",
    "netdev": "type",
    "object": "qom-type",
    "option-rom": "romfile",
    "smbios": "file",
    "tpmdev": "type",
    "virtfs": "fsdriver",
}
_IMAGES = {"blockdev": "driver", "drive": "file"}
"""Options that name images of disks, with the key of a bare first word."""
_LINES = frozenset({"debugcon", "monitor", "parallel", "qmp", "qmp-pretty", "serial"})
"""Options whose value may be a character device in the short spelling."""
_FIRMWARE = frozenset({"bios", "device", "option-rom"})
"""A relative name here means a file of QEMU's own, wherever it keeps them."""


def named_files(options: Sequence[Option], cwd: str | None) -> Iterator[NamedFile]:
    """All that are recognised, in order.

    *cwd*: where relative names begin; None: not known, and these are left out.
    """
    for option in options:
        for path, use in _of_option(option):
            if os.path.isabs(path):
                yield NamedFile(option, os.path.normpath(path), use)
            elif cwd is not None and option.name not in _FIRMWARE:
                yield NamedFile(option, os.path.normpath(os.path.join(cwd, path)), use)


def _of_option(option: Option) -> Iterator[tuple[str, Use]]:
    value = option.value
    if not value:
        return
    if option.name in _WHOLE:
        yield value, _WHOLE[option.name]
    elif option.name in _LINES:
        yield from _of_line(value)
    elif option.name == "vnc" and value.startswith("unix:"):
        yield value.removeprefix("unix:").split(",")[0], Use.LISTEN
    elif option.name in _IMAGES:
        yield from _of_image(value, _IMAGES[option.name])
    elif option.name in _PARTS:
        try:
            fields = Fields.parse(value, first_key=_FIRST_KEYS[option.name])
        except ValueError:  # JSON in QEMU's dialect
            return
        for key, use in _PARTS[option.name].items():
            if isinstance(fields.get(key), str):
                yield fields[key], use
        if option.name == "chardev":
            yield from _of_chardev(fields)


def _of_image(value: str, first_key: str) -> Iterator[tuple[str, Use]]:
    """All that an image needs is to be read: one that is written to is known as a disk."""
    try:
        fields = Fields.parse(value, first_key=first_key)
    except ValueError:
        return
    is_drive = first_key == "file"
    for key, name in fields.items():
        names = key == "filename" or key.endswith(".filename") or (is_drive and key == "file")
        protocol = fields.get(f"{key.removesuffix('filename')}driver", "file")
        if names and isinstance(name, str) and (protocol == "file" or is_drive):
            plain = name.removeprefix("file:")
            if plain.startswith("/") or ":" not in plain:  # else "nbd:..." and the like
                yield plain, Use.READ


def _of_chardev(fields: Fields) -> Iterator[tuple[str, Use]]:
    path = fields.get("path")
    if not isinstance(path, str):
        return
    match fields.get("backend"):
        case "socket" if not fields.is_on("abstract"):
            yield path, Use.LISTEN if fields.is_on("server") else Use.CONNECT
        case "file":
            yield path, Use.WRITE
            if "input-path" in fields:
                yield str(fields["input-path"]), Use.READ
        case "serial" | "tty" | "parallel" | "parport":
            yield path, Use.WRITE


def _of_line(value: str) -> Iterator[tuple[str, Use]]:
    kind, _, rest = value.partition(":")
    path, *flags = rest.split(",")
    match kind:
        case "unix":
            given = {flag.partition("=")[0]: flag.partition("=")[2] for flag in flags}
            listens = given.get("server", "off") in ("", "on", "yes")
            yield path, Use.LISTEN if listens else Use.CONNECT
        case "file":
            yield path, Use.WRITE
        case _ if value.startswith("/dev/"):
            yield value, Use.WRITE
