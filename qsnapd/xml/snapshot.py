"""A stored snapshot as a `<domainsnapshot>`, and back again without loss.

The whole manifest lies within. Of the elements around it a person may edit four: name,
description, parent and creationTime. One that was edited counts more than the manifest; one
that is as it was written leaves the manifest's value, which may be finer.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from lxml import etree
from pydantic import ValidationError

from qsnapd.errors import BadRequest
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import Manifest
from qsnapd.xml.domain import MANIFEST_TAG, add_domain
from qsnapd.xml.escaping import plain
from qsnapd.xml.meaning import INTERNAL
from qsnapd.xml.reading import ROOT, Element, children, parse, refuse, text
from qsnapd.xml.writing import add, add_source, as_text, is_device, is_target

_KNOWN = (
    *("name", "description", "state", "creationTime", "parent", "memory", "disks", "domain"),
    *("inactiveDomain", "cookie", "active", "revertDisks"),
)
_REQUIRED = ("state", "creationTime", "domain")
_FIXED = ("state", "memory", "disks")
"""What the manifest alone decides."""


def write_snapshot(manifest: Manifest) -> str:
    """Write a snapshot as libvirt would; it fits its schema, with `--redefine` it comes back."""
    root = etree.Element(ROOT)
    add(root, "name", manifest.name)
    if manifest.description:
        add(root, "description", manifest.description)
    add(root, "state", state_of(manifest))
    if manifest.parent is not None:
        add(add(root, "parent"), "name", manifest.parent)
    add(root, "creationTime", _seconds(manifest))
    if manifest.memory is not None:
        add(root, "memory", snapshot="external", file=manifest.memory.path)
    else:
        add(root, "memory", snapshot="no")
    _add_disks(root, manifest)
    add_domain(root, manifest)
    return as_text(root)


def state_of(manifest: Manifest) -> str:
    """libvirt's word for the VM's state in a snapshot."""
    return "disk-snapshot" if manifest.is_disk_only else manifest.state


def _seconds(manifest: Manifest) -> str:
    return str(int(manifest.created_at.timestamp()))


def _add_disks(root: Element, manifest: Manifest) -> None:
    disks = add(root, "disks")
    for disk in manifest.disks:
        name = disk.target if is_target(disk.target) else disk.frozen
        kind = "block" if disk.overlay is not None and is_device(disk.overlay) else "file"
        element = add(disks, "disk", name=name, snapshot="external", type=kind)
        if disk.overlay is not None:
            add(element, "driver", type="qcow2")
            add_source(element, disk.overlay)
    for disk in manifest.left_out:
        if is_target(disk.target):
            mode = "manual" if disk.target in manifest.manual_disks else "no"
            add(disks, "disk", name=disk.target, snapshot=mode)


def read_snapshot(data: bytes) -> Manifest:
    """Read what `write_snapshot` has written, with what was edited since.

    Raises: BadRequest: it is no such XML, or contradicts itself. ManifestInvalid,
      ManifestTooNew: the manifest within is damaged, or of a newer qsnapd.
    """
    root = parse(data)
    found = children(root, _KNOWN)
    if "name" not in found:
        refuse(root, "a redefined snapshot must have a name")
    for name in _REQUIRED:
        if name not in found:
            refuse(root, f"missing <{name}> in existing snapshot")
    inner = _manifest_within(found["domain"])
    written = children(parse(write_snapshot(inner).encode()), _KNOWN)
    for name in _FIXED:
        _require_same(name, found.get(name), written[name], root)
    _require_same_vm(found["domain"], written["domain"])
    edits = dict(_edits(inner, found))
    try:
        return Manifest.model_validate(dict(inner) | edits)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        words = str(first["msg"]).removeprefix("Value error, ")
        raise BadRequest(f"{'.'.join(map(str, first['loc']))}: {words}") from exc


def _manifest_within(domain: Element) -> Manifest:
    held = domain.findall(f"metadata/{MANIFEST_TAG}")
    if len(held) != 1:
        refuse(
            domain,
            "there is no manifest of qsnapd in <domain><metadata>: only snapshots that qsnapd has "
            "taken, as snapshot-dumpxml prints them, can be defined again",
        )
    where = f"the manifest in line {held[0].sourceline} of the XML"
    return parse_manifest(held[0].text or "", where)


def _edits(inner: Manifest, found: dict[str, Element]) -> Iterator[tuple[str, Any]]:
    if (name := text(found["name"])) != plain(inner.name):
        yield "name", name
    description = text(found["description"]) if "description" in found else ""
    if description != plain(inner.description):
        yield "description", description
    parent = _parent(found["parent"]) if "parent" in found else None
    if parent != (plain(inner.parent) if inner.parent is not None else None):
        yield "parent", parent
    if (seconds := text(found["creationTime"]).strip()) != _seconds(inner):
        yield "created_at", _time(found["creationTime"], seconds)


def _parent(element: Element) -> str:
    inside = children(element, ("name",))
    if "name" not in inside:
        refuse(element, "<parent> has no <name>")
    return text(inside["name"])


def _time(element: Element, seconds: str) -> datetime:
    try:
        return datetime.fromtimestamp(int(seconds), UTC)
    except (ValueError, OverflowError, OSError):
        refuse(element, f"creationTime {seconds[:40]!r} is no number of seconds since 1970")


def _require_same(name: str, found: Element | None, written: Element, root: Element) -> None:
    if found is None:
        return  # libvirt too can do without
    _refuse_internal(found)
    if _essence(found) != _essence(written):
        refuse(
            found,
            f"<{name}> contradicts the manifest in <domain><metadata>: name, description, parent "
            "and creationTime can be edited, what was saved cannot",
        )


def _refuse_internal(element: Element) -> None:
    for inside in element.iter():
        if inside.get("snapshot") == "internal":
            refuse(inside, INTERNAL)


def _require_same_vm(found: Element, written: Element) -> None:
    for name in ("name", "uuid"):
        theirs, ours = found.findtext(name), written.findtext(name)
        if theirs is not None and theirs.strip() != ours:
            refuse(
                found,
                f"<domain> has {name} {theirs.strip()!r}, the manifest within is of {ours!r}",
            )


def _essence(element: Element) -> object:
    """What *element* says of state and files; what else is there, other versions may add."""
    return (
        [element.get(key) for key in ("name", "snapshot", "file", "dev")],
        (element.text or "").strip(),
        [_essence(child) for child in element if child.tag in ("disk", "source")],
    )
