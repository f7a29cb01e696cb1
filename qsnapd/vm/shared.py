"""What two QEMUs cannot have both: refused in words before anything is started."""

import os.path
from collections.abc import Collection, Iterable, Sequence

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Option
from qsnapd.vm.disk_options import DiskOptions
from qsnapd.vm.members import Members

_FIRST_KEYS = {
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "fsdev": "fsdriver",
    "icount": "shift",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "tpmdev": "type",
    "virtfs": "fsdriver",
}
_HELD_BY_ONE = {
    "vhost-vdpa": "the device",
    "af-xdp": "the interface's queues",
    "netmap": "the port",
    "l2tpv3": "the tunnel's end",
}
_STATE_ELSEWHERE = "what this device knows is in another process, which serves the original"
_REMOTE_DRIVERS = (
    "gluster iscsi io_uring libnfs nbd nfs nvme nvme-io_uring rbd sheepdog ssh "
    "virtio-blk-vfio-pci virtio-blk-vhost-user virtio-blk-vhost-vdpa vvfat"
)
_REMOTE = frozenset(_REMOTE_DRIVERS.split())


def refuse_shared(options: Sequence[Option], substitutes: Collection[str] = ()) -> None:
    """Raise Blocked if an option needs something that only one QEMU can have.

    A vhost-user device is fine if its socket has a substitute.
    """
    free = set(_sockets_given(options, substitutes))
    for option in options:
        reason = _reason(option, free)
        if reason:
            raise Blocked(f"{option}: {reason}")


def require_own_images(options: Sequence[Option], own: Collection[str], cwd: str) -> None:
    """Raise Blocked if an image is writable that is none of *own*: another QEMU writes it."""
    mine = {os.path.normpath(path) for path in own}
    for option in options:
        if option.name in ("fda", "fdb") and option.value is not None:
            _require_own(option, option.value, mine, cwd)
        if option.name in ("blockdev", "drive") and (driver := _remote_driver(option)):
            raise Blocked(
                f"{option}: it is writable, not a part of the snapshot, and two VMs cannot "
                f"write to it over {driver}; take the snapshot without it attached"
            )
    for mention in DiskOptions(options).mentions():
        _require_own(options[mention.index], mention.filename, mine, cwd)


def _require_own(option: Option, filename: str, own: Collection[str], cwd: str) -> None:
    if os.path.normpath(os.path.join(cwd, filename)) not in own:
        raise Blocked(
            f"{option}: {filename} is writable and not a part of the snapshot: two VMs cannot "
            "write to it. Attach it read-only, or take the snapshot with it or without it attached"
        )


def _remote_driver(option: Option) -> str | None:
    members = Members.of(option, "driver")
    if members.is_on("read-only") or members.is_on("readonly"):
        return None
    drivers = [str(value) for key, value in members if key.rsplit(".", 1)[-1] == "driver"]
    return next((driver for driver in drivers if driver in _REMOTE), None)


def _sockets_given(options: Sequence[Option], substitutes: Collection[str]) -> Iterable[str]:
    """Ids of chardevs whose path has a substitute."""
    for option in options:
        if option.name == "chardev":
            members = Members.of(option, "backend")
            if members.get("path") in substitutes:
                yield members.get("id")


def _reason(option: Option, free: Collection[str]) -> str | None:
    if option.name == "readconfig":
        return "qsnapd does not read this file, which may name what two VMs cannot share"
    if option.name == "set":
        group = (option.value or "").split(".")[0]
        return f"write this into the -{group} itself, qsnapd changes only that"
    first_key = _FIRST_KEYS.get(option.name)
    if first_key is None:
        return None
    members = Members.of(option, first_key)
    kind = members.get(first_key)
    if "vhost-user" in kind and members.get("chardev") not in free:
        return (
            "the program that it talks to by vhost-user serves the original; start another, and "
            "say which socket is to be used in place of the original's"
        )
    match option.name:
        case "netdev" | "nic" if kind in _HELD_BY_ONE:
            return f"{_HELD_BY_ONE[kind]} can be used by one VM only"
        case "netdev" | "nic" if kind == "passt" and any(k.endswith("-ports") for k, _ in members):
            return "its ports are those of the original"
        case "device" if kind.startswith(("vhost-scsi", "vfio-", "usb-host", "scsi-generic")):
            return "the host's device can be used by one VM only"
        case "icount" if members.get("rr") in ("record", "replay"):
            return "its recording belongs to one run of the original"
        case "tpmdev":
            return _STATE_ELSEWHERE
        case "object" if kind == "dbus-vmstate":
            return _STATE_ELSEWHERE
        case "fsdev" | "virtfs" if kind == "proxy":
            return _STATE_ELSEWHERE
    return None
