"""What the words of memory and disk elements mean, in XML as in virsh's specs.

The refusals are those of libvirt's parser, in its words. Where qsnapd does less than libvirt
it says so, instead of doing something else. Light: the command line imports it each time.
"""

from qsnapd.errors import BadRequest

INTERNAL = (
    "internal snapshots are not made: qsnapd's are external only, by design (a file for the "
    "memory, an overlay for each disk)"
)
"""The one thing that virsh has and qsnapd leaves out on purpose."""
_NO_TARGETS = {
    "network": "overlays on network storage are not made: a file or a block device is needed",
    "nvme": "overlays on NVMe devices by their PCI address are not made",
}


def memory_meaning(mode: str | None, file: str | None) -> dict[str, object]:
    """The fields of a CreateRequest that ask for this; *mode* is the attribute `snapshot`.

    Raises: BadRequest.
    """
    if mode is None and file is not None:
        mode = "external"
    match mode:
        case "manual":
            raise BadRequest("'manual' memory snapshot mode not supported")
        case "internal":
            raise BadRequest(INTERNAL)
        case None | "no" | "external":
            pass
        case _:
            raise BadRequest(_invalid("snapshot", "memory", mode))
    if file is not None and mode != "external":
        raise BadRequest(f"memory filename '{file}' requires external snapshot")
    if mode == "external" and not file:
        raise BadRequest("external memory snapshots require a filename")
    if file is not None and not file.startswith("/"):
        raise BadRequest(f"memory snapshot file path ({file}) must be absolute")
    return {"memory_file": file, "disk_only": mode == "no"}


def disk_meaning(
    name: str | None,
    *,
    mode: str | None = None,
    kind: str | None = None,
    driver: str | None = None,
    file: str | None = None,
) -> dict[str, object]:
    """A DiskRequest that asks for this; *mode* and *kind* are `snapshot` and `type`.

    Raises: BadRequest.
    """
    mode, kind = mode or "external", kind or "file"
    if not name:
        raise BadRequest("missing name from disk snapshot element")
    if mode == "internal":
        raise BadRequest(INTERNAL)
    if mode not in ("external", "no", "manual"):
        raise BadRequest(_invalid("snapshot", "disk", mode))
    if kind in _NO_TARGETS:
        raise BadRequest(f"unsupported disk snapshot type: '{kind}' ({_NO_TARGETS[kind]})")
    if kind not in ("file", "block"):
        raise BadRequest(f"unsupported disk snapshot type: '{kind}'")
    if file is not None and not file.startswith("/"):
        raise BadRequest(f"disk snapshot image path '{file}' must be absolute")
    if driver not in (None, "qcow2"):
        raise BadRequest(f"external snapshot format for disk {name} is unsupported: {driver}")
    if mode != "external" and file is not None:
        raise BadRequest(
            f"file '{file}' for disk '{name}' requires use of external snapshot mode"
        )
    return {"target": name, "snapshot": mode, "file": file, "target_type": kind}


def require_each_once(disks: list[dict[str, object]]) -> None:
    """Raise BadRequest if two of these DiskRequests are for one disk."""
    seen = set[object]()
    for name in (disk["target"] for disk in disks):
        if name in seen:
            raise BadRequest(f"disk '{name}' specified twice")
        seen.add(name)


def _invalid(attribute: str, element: str, value: str) -> str:
    return f"Invalid value for attribute '{attribute}' in element '{element}': '{value}'."
