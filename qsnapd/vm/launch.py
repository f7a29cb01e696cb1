"""The command line that starts a VM again, on other disks.

Pure: nothing is started and no file is touched; the caller says which file a name means.
What cannot be started again the same way is refused here, before anything is ended.
"""

import json
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from qsnapd.errors import Blocked
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity, Machine, Process
from qsnapd.vm.argv import Fields, Option, parse_options, words_of
from qsnapd.vm.descriptors import apply_instead, refuse_descriptors
from qsnapd.vm.disk_options import DiskOptions, Mention
from qsnapd.vm.proc import ARGV_VARIABLE, TOKEN_VARIABLE

Identify = Callable[[str], tuple[int, int] | None]
"""Device and inode of what an absolute path leads to now, e.g. `vm.identity.key_of`."""

DELETED = " (deleted)"
"""What Linux appends to the name of a program whose file is gone."""

_STALE = frozenset({"incoming", "loadvm", "S", "runas"})
"""Of one start only; and who gave up root for another user is started as that user."""
_REFUSED = {
    "chroot": "where its files are can be seen from within only",
    "snapshot": "all disk writes of this VM are thrown away when it ends",
    "preconfig": "a VM that is configured over QMP before it starts cannot be started again",
}


class Start(Enum):
    """What a QEMU does once it is up."""

    LOAD = "load"
    """Waits for `migrate-incoming`, and stays stopped after the load."""
    BOOT = "boot"
    HALTED = "halted"
    """Boots as soon as it is told to run."""

    @property
    def options(self) -> tuple[Option, ...]:
        """What says so on the command line."""
        return _STARTING[self]


_STARTING = {
    Start.LOAD: (Option("incoming", "defer"), Option("S")),
    Start.BOOT: (),
    Start.HALTED: (Option("S"),),
}


@dataclass(frozen=True)
class Parent:
    """What whoever starts a QEMU has for it that its command line cannot repeat."""

    inherits_descriptors: bool = False
    """They come from above, the same as before."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """What the configuration puts in place of options; see `vm.descriptors`."""


NOBODY = Parent()


@dataclass(frozen=True)
class MovedDisk:
    """A disk that is to be found on a new image."""

    target: str
    chain: tuple[FileIdentity, ...]
    """Its recorded images, newest first: the command line names one of them."""
    overlay: str
    """Absolute path of the qcow2 file to use instead."""
    stays: bool = False
    """It is to be on the newest of its recorded images, whatever of them is named."""


@dataclass(frozen=True)
class CommandLine:
    """A recorded command line on its way to another one."""

    options: tuple[Option, ...]
    cwd: str

    def changed(self, options: Sequence[Option]) -> "CommandLine":
        return replace(self, options=tuple(options))


def read_command_line(
    process: Process,
    machine: Machine,
    disks: Sequence[MovedDisk],
    *,
    identify: Identify,
    parent: Parent = NOBODY,
) -> CommandLine:
    """Read how *process* was started, with *disks* on their overlays and the machine pinned.

    What belonged to one start only is gone (`-incoming`, `-loadvm`, `-S`). Everything else
    is as recorded: sockets, names, log files. Descriptors that its parent had passed are
    refused, unless *parent*, the next one, passes them again or has something instead.

    Raises: Blocked: it cannot be started the same way; says which disk or option, and why.
    """
    options = apply_instead(parse_options(process.argv[1:]), parent.instead)
    for option in options:
        _refuse(option, parent)
    options = [kept for o in options if o.name not in _STALE and (kept := _without_user(o))]
    cwd = process.cwd
    disk_options = DiskOptions(options)
    for disk, found in _find(disks, list(disk_options.mentions()), process, identify).items():
        if not (disk.stays and found.rank == 0):
            disk_options.replace(found.mention, disk.overlay)
        cwd = found.cwd or cwd
    return CommandLine(tuple(_pin_machine(disk_options.options(), machine.type)), cwd)


def launch_of(
    process: Process,
    line: CommandLine,
    *,
    start: Start,
    token: str,
    identify: Identify,
    plain: CommandLine | None = None,
) -> Launch:
    """Turn *line* into what a launcher executes, as who *process* ran as.

    *plain*: what a later snapshot is to record of the new process, if that is another line.
    Raises: Blocked: the program is gone.
    """
    environment: Mapping[str, str] = dict(process.environment) | {TOKEN_VARIABLE: token}
    if plain is not None:
        words = (process.argv[0], *words_of(plain.options))
        environment = {**environment, ARGV_VARIABLE: json.dumps(words)}
    return Launch(
        token=token,
        executable=_executable(process.exe, identify),
        argv=(process.argv[0], *words_of([*line.options, *start.options])),
        cwd=line.cwd,
        uid=process.uid,
        gid=process.gid,
        groups=process.groups,
        environment=tuple(environment.items()),
    )


def _refuse(option: Option, parent: Parent) -> None:
    if option.name in _REFUSED:
        raise Blocked(f"{option}: {_REFUSED[option.name]}")
    if option.name == "set" and (option.value or "").startswith("drive."):
        raise Blocked(f"{option}: write this into the -drive itself, qsnapd changes only that")
    if not parent.inherits_descriptors:
        refuse_descriptors(option)


def _without_user(option: Option) -> Option | None:
    """-run-with user= (QEMU >= 9.1) is what -runas was."""
    if option.name != "run-with":
        return option
    fields = Fields.parse(option.value or "")
    if "chroot" in fields:
        raise Blocked(f"{option}: {_REFUSED['chroot']}")
    fields.drop("user")
    return Option(option.name, str(fields), option.dashes) if fields else None


def _executable(exe: str, identify: Identify) -> str:
    """The program's file; after an upgrade of its package, the one now in its place.

    A newer QEMU loads what an older one saved, given the same machine type.
    """
    path = exe.removesuffix(DELETED)
    if identify(path) is None:
        raise Blocked(f"the QEMU that this VM ran on, {path}, is no longer there: install it again")
    return path


def _pin_machine(options: Sequence[Option], machine_type: str) -> Iterator[Option]:
    """Replace aliases like "pc", which mean another machine in the next QEMU."""
    pinned = False
    for option in options:
        if option.name not in ("machine", "M"):
            yield option
            continue
        fields = Fields.parse(option.value or "", first_key="type")
        if "type" in fields:
            fields["type"] = machine_type
            pinned = True
        yield Option(option.name, str(fields), option.dashes)
    if not pinned:
        yield Option("machine", f"type={machine_type}")


@dataclass(frozen=True)
class _Found:
    mention: Mention
    rank: int
    """How far down the disk's chain the named image is."""
    cwd: str | None = None
    """Where QEMU must have been started for the name to mean that image."""


def _find(
    disks: Sequence[MovedDisk], mentions: Sequence[Mention], process: Process, identify: Identify
) -> dict[MovedDisk, _Found]:
    """For each disk the one mention of its newest image."""
    found: dict[MovedDisk, _Found] = {}
    daemonized = any(option.name == "daemonize" for option in parse_options(process.argv[1:]))
    for disk in disks:
        matches = [
            match
            for mention in mentions
            if (match := _match(mention, disk.chain, process.cwd, identify, daemonized=daemonized))
        ]
        newest = min((match.rank for match in matches), default=0)
        best = [match for match in matches if match.rank == newest]
        if not best and disk.stays:
            continue  # plugged in by hand, or by the guest's user: not ours to bring back
        if not best:
            raise Blocked(_not_found(disk, process))
        if len(best) > 1:
            raise Blocked(
                f"disk {disk.target}: the command line names its image "
                f"{best[0].mention.filename} more than once, so it is unclear which is the disk"
            )
        for other, taken in found.items():
            if taken.mention == best[0].mention:
                raise Blocked(
                    f"disks {other.target} and {disk.target} both seem to be "
                    f"{best[0].mention.filename} on the command line"
                )
        found[disk] = best[0]
    return found


def _match(
    mention: Mention,
    chain: Sequence[FileIdentity],
    cwd: str,
    identify: Identify,
    *,
    daemonized: bool,
) -> _Found | None:
    name = os.path.normpath(mention.filename)
    path = os.path.normpath(os.path.join(cwd, name))
    meant = identify(path)
    for rank, link in enumerate(chain):
        # Device numbers can change with a reboot: what the recorded path leads to now counts.
        if path == link.path or (
            meant is not None and meant == (identify(link.path) or (link.device, link.inode))
        ):
            return _Found(mention, rank)
    if not os.path.isabs(name) and daemonized:
        # -daemonize moves to "/": where QEMU was started may not be known, but the image is.
        for rank, link in enumerate(chain):
            if link.path.endswith(f"/{name}"):
                return _Found(mention, rank, cwd=link.path.removesuffix(name).rstrip("/") or "/")
    return None


def _not_found(disk: MovedDisk, process: Process) -> str:
    image = disk.chain[-1].path if disk.chain else "unknown"
    hint = "it was plugged in later, or handed over as a descriptor"
    if any(option.name == "readconfig" for option in parse_options(process.argv[1:])):
        hint = "it may be in the file given to -readconfig, which qsnapd does not read"
    return (
        f"disk {disk.target}: QEMU's command line names none of its images (the oldest is "
        f"{image}); {hint}. Start the VM with this disk as -blockdev or -drive to be able to "
        "put it back"
    )
