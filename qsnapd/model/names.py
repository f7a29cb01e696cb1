"""Names of VMs and snapshots, safe to use as one component of a path."""

from typing import Annotated

from pydantic import AfterValidator

NAME_LIMIT_BYTES = 128
"""Leaves room for prefixes and suffixes within the 255 bytes of a file name."""


def check_name(name: str) -> str:
    """Return *name* if it can be one component of a path; ValueError says why not.

    Follows libvirt's rule for snapshot names (no "/", no leading "."), and also refuses
    control characters, surrounding blanks and names too long for the files they lead to.
    """
    if not name:
        raise ValueError("a name must not be empty")
    if "/" in name:
        raise ValueError(f"invalid name {name!r}: it must not contain '/'")
    if name.startswith("."):
        raise ValueError(f"invalid name {name!r}: it must not start with '.'")
    if name.startswith("-"):
        raise ValueError(f"invalid name {name!r}: it must not start with '-'")
    if not name.isprintable() or name != name.strip():
        raise ValueError(f"invalid name {name!r}: control characters or surrounding blanks")
    if len(name.encode("utf-8", "surrogateescape")) > NAME_LIMIT_BYTES:
        raise ValueError(f"invalid name: longer than {NAME_LIMIT_BYTES} bytes")
    return name


def is_name(word: str) -> bool:
    """Whether `check_name` would return it."""
    try:
        check_name(word)
    except ValueError:
        return False
    return True


VmName = Annotated[str, AfterValidator(check_name)]
SnapshotName = Annotated[str, AfterValidator(check_name)]
