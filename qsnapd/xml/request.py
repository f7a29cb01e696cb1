"""What a `<domainsnapshot>` asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from qsnapd.errors import BadRequest
from qsnapd.model.request import CreateRequest
from qsnapd.xml.meaning import disk_meaning, memory_meaning, require_each_once
from qsnapd.xml.reading import (
    Element,
    attributes,
    children,
    items,
    name_of,
    only_attributes,
    parse,
    refuse,
    text,
)

_OUTPUT = ("state", "parent", "creationTime", "domain", "inactiveDomain", "cookie", "active")
"""What libvirt writes itself, and passes over when it is asked for a new snapshot."""
_KNOWN = ("name", "description", "memory", "disks", "revertDisks", *_OUTPUT)
_SOURCE_EXTRAS = ("seclabel", "encryption", "reservations", "slices", "ssl", "cookies")


def read_request(data: bytes) -> CreateRequest:
    """Read what snapshot is wanted; `<memory snapshot='no'/>` is a disk-only one.

    Elements that only libvirt fills in are passed over, as it does itself.
    Raises: BadRequest: it says something that cannot be, or that is not understood.
    """
    found = children(parse(data), _KNOWN)
    request: dict[str, Any] = {}
    if (name := found.get("name")) is not None:
        request["name"] = text(name)
    if (description := found.get("description")) is not None:
        request["description"] = text(description)
    if (memory := found.get("memory")) is not None:
        said = only_attributes(memory, ("snapshot", "file"))
        with _at(memory):
            request |= memory_meaning(said.get("snapshot"), said.get("file"))
    if (disks := found.get("disks")) is not None:
        attributes(disks, ())
        request["disks"] = [_read_disk(disk) for disk in items(disks, ("disk",))]
        with _at(disks):
            require_each_once(request["disks"])
    try:
        return CreateRequest.model_validate(request)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        words = str(first["msg"]).removeprefix("Value error, ")
        raise BadRequest(f"{field}: {words}") from exc


@contextmanager
def _at(element: Element) -> Iterator[None]:
    try:
        yield
    except BadRequest as exc:
        refuse(element, str(exc))


def _read_disk(element: Element) -> dict[str, object]:
    said = attributes(element, ("name", "snapshot", "type"))
    inside = children(element, ("driver", "source"))
    kind, driver, file = said.get("type"), None, None
    with _at(element):  # first of all: of the other types the source is not even understood
        disk_meaning(said.get("name"), mode=said.get("snapshot"), kind=kind)
    if "driver" in inside:
        driver = attributes(inside["driver"], ("type",)).get("type")
        for cache in items(inside["driver"], ("metadata_cache",)):
            refuse(cache, "<metadata_cache> of an overlay is not supported")
    if "source" in inside:
        file = _read_source(inside["source"], kind or "file")
    with _at(element):
        return disk_meaning(
            *(said.get("name"),), mode=said.get("snapshot"), kind=kind, driver=driver, file=file
        )


def _read_source(element: Element, kind: str) -> str | None:
    key = "file" if kind == "file" else "dev"
    path = attributes(element, (key,)).get(key)
    for extra in items(element, _SOURCE_EXTRAS):
        refuse(extra, f"<{name_of(extra)}> of an overlay is not supported")
    return path
