"""The command line of a second VM beside the first: what two QEMUs must not share.

Pure but for questions to the file system. What the guest can see stays as it is, except for
what makes a VM that VM: MAC addresses, UUID, context id. These are not part of what QEMU
loads, or are loaded over it, so (measured on 7.2 and 10.0): after the load `query-uuid` says
the new UUID, while the guest's SMBIOS tables, which are in its memory, and its network cards
have the old values until the guest is reset. rtl8139 keeps the old MAC even then, until its
QEMU is started anew. A generation id is written into the guest's memory by the load itself.
"""

import os.path
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from qsnapd.errors import Blocked
from qsnapd.model.request import Identity
from qsnapd.vm import apart_chardev, apart_net, apart_screen
from qsnapd.vm.apart_seen import own_cid, renew_uuid
from qsnapd.vm.argv import Option, escaped
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import OwnNames, Wishes, beside, fitting
from qsnapd.vm.shared import refuse_shared, require_own_images


@dataclass(frozen=True)
class Apart:
    """A command line that runs beside the one it was made from."""

    options: tuple[Option, ...]
    qmp: str
    """Absolute path of the monitor that is qsnapd's."""
    renamed: dict[str, str]
    """Absolute paths of files and sockets that QEMU makes: the original's to the clone's."""
    made: tuple[str, ...]
    """Those of the clone's that nobody had before, because they were made up here."""
    pipes: tuple[str, ...]
    """FIFOs that must be there before QEMU starts."""
    notes: tuple[str, ...]
    """What differs from the original, and what they still share: sentences for people."""


def set_apart(
    options: Sequence[Option],
    *,
    clone: str,
    cwd: str,
    seed: str,
    qmp_from: str,
    qmp_to: str | None = None,
    images: Collection[str] = (),
    mac: Identity = Identity.NEW,
    uuid: Identity = Identity.NEW,
    substitutes: Mapping[str, str] | None = None,
    is_taken: Callable[[str], bool] = os.path.lexists,
    is_folder: Callable[[str], bool] = os.path.isdir,
    real: Callable[[str], str] = os.path.realpath,
) -> Apart:
    """Make of the command line of a VM that of its copy *clone*, to run beside it.

    *qmp_from* is the original's monitor for qsnapd, *qmp_to* the clone's; by default named
    like every other socket. *images* are the disk images that the clone has to itself.
    *substitutes* gives paths, interfaces and ports, which QEMU cannot choose by itself, the
    names they have for the clone.

    Raises: Blocked: something cannot be had twice; says which option, and what to do.
    """
    given = dict(substitutes or {})
    made = () if qmp_to else (_monitor_beside(qmp_from, clone, is_taken),)
    qmp_to = qmp_to or _monitor_beside(qmp_from, clone, is_taken)
    given[qmp_from] = fitting(qmp_to, "the monitor")

    def transform(avoid: Collection[str]) -> tuple[list[Option], Wishes]:
        names = OwnNames(
            clone, cwd=cwd, substitutes=given, avoid=avoid, is_taken=is_taken, real=real
        )
        wishes = Wishes(names, clone, seed, mac, uuid, is_folder)
        return _transformed(options, wishes), wishes

    refuse_shared(options, given)
    require_own_images(options, {os.path.join(cwd, image) for image in images}, cwd)
    # Twice: a name made in the first turn may be one that the original has for another file.
    _, first = transform(())
    changed, wishes = transform(first.names.files.keys())
    if qmp_from not in wishes.names.used:
        # e.g. it was passed as a descriptor, and left out since
        changed.append(Option("qmp", f"unix:{escaped(qmp_to)},server=on,wait=off"))
        wishes.names.files[qmp_from] = qmp_to
    if unused := sorted(given.keys() - wishes.names.used - {qmp_from}):
        raise Blocked(
            f"nothing on the command line is called {', '.join(unused)}: there is nothing to "
            "put something else in place of"
        )
    return Apart(
        options=tuple(changed),
        qmp=qmp_to,
        renamed=wishes.names.files,
        made=tuple(sorted({*wishes.names.found, *made})),
        pipes=tuple(wishes.pipes),
        notes=tuple(dict.fromkeys(wishes.notes)),
    )


def _monitor_beside(path: str, clone: str, is_taken: Callable[[str], bool]) -> str:
    new, number = beside(path, clone), 1
    while is_taken(new):
        number += 1
        new = beside(path, clone, number)
    return new


def _transformed(options: Sequence[Option], wishes: Wishes) -> list[Option]:
    changed: list[Option] = []
    for option in options:
        changed += _HANDLERS.get(option.name, _stays)(option, wishes)
    changed = renew_uuid(changed, wishes)
    if not any(option.name == "name" for option in options):
        changed.append(Option("name", f"guest={escaped(wishes.clone)}"))
    return changed


def _stays(option: Option, wishes: Wishes) -> list[Option]:
    return [option]


def _name(option: Option, wishes: Wishes) -> list[Option]:
    members = Members.of(option, "guest")
    members.set("guest", wishes.clone)
    return [Option(option.name, str(members), option.dashes)]


def _file(option: Option, wishes: Wishes) -> list[Option]:
    return [Option(option.name, wishes.names.file(option.value or ""), option.dashes)]


def _log_file(option: Option, wishes: Wishes) -> list[Option]:
    # "%d" stands for the process id: it is another file already.
    return [option] if "%d" in (option.value or "") else _file(option, wishes)


def _member(key: str, first_key: str | None) -> Callable[[Option, Wishes], list[Option]]:
    def handle(option: Option, wishes: Wishes) -> list[Option]:
        members = Members.of(option, first_key)
        members.rewrite(key, wishes.names.file)
        return [Option(option.name, str(members), option.dashes)]

    return handle


def _object(option: Option, wishes: Wishes) -> list[Option]:
    members = Members.of(option, "qom-type")
    match members.get("qom-type"):
        case "memory-backend-file" if members.is_on("share") and not members.is_on("readonly"):
            path = members.get("mem-path")
            if not wishes.is_folder(wishes.names.absolute(path)):  # e.g. a hugetlbfs
                members.rewrite("mem-path", wishes.names.file)
        case "filter-dump":
            members.rewrite("file", wishes.names.file)
    return [Option(option.name, str(members), option.dashes)]


def _device(option: Option, wishes: Wishes) -> list[Option]:
    members = Members.of(option, "driver")
    apart_net.renew_mac(members, "mac", wishes, is_nic="netdev" in members)
    if cid := members.get("guest-cid"):
        new = wishes.names.substitute(cid) or own_cid(wishes.seed)
        members.set("guest-cid", new)
        wishes.notes.append(f"vsock context id {new} instead of {cid}")
    return [Option(option.name, str(members), option.dashes)]


def _shared_folder(option: Option, wishes: Wishes) -> list[Option]:
    path = Members.of(option, "fsdriver").get("path")
    wishes.notes.append(f"the folder {path} is shared with the original's guest")
    return [option]


_HANDLERS: dict[str, Callable[[Option, Wishes], list[Option]]] = {
    "D": _log_file,
    "audio": _member("path", "driver"),
    "audiodev": _member("path", "driver"),
    "chardev": apart_chardev.chardev,
    "device": _device,
    "fsdev": _shared_folder,
    "name": _name,
    "object": _object,
    "pidfile": _file,
    "qtest-log": _file,
    "trace": _member("file", "enable"),
    "virtfs": _shared_folder,
    **dict.fromkeys(
        ("debugcon", "gdb", "monitor", "parallel", "qmp", "qmp-pretty", "qtest", "serial"),
        apart_chardev.character_device,
    ),
    "s": apart_chardev.debugger,
    **dict.fromkeys(("net", "netdev", "nic"), apart_net.network),
    "display": apart_screen.display,
    "spice": apart_screen.spice,
    "vnc": apart_screen.vnc,
}
