"""Verbs that take snapshots, and that define one again from its XML."""

import os
from collections.abc import Callable
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.completion import complete_field
from qsnapd.cli.jobs import follow
from qsnapd.cli.output import print_json, print_notes
from qsnapd.cli.specs import DiskSpec, MemSpec, request_xml
from qsnapd.errors import BadRequest, TargetRefused
from qsnapd.xml.meaning import require_each_once

_STRATEGIES = click.Choice(["stopped", "precopy", "background"])
_FORMATS = click.Choice(["stream", "mapped-ram"])
_POSITIVE = click.FloatRange(min=0, min_open=True)
_EMPTY = b"<domainsnapshot/>"

Verb = Callable[..., None]

_FLAGS = (
    ("--live", "Let the guest run while its memory is saved."),
    ("--disk-only", "Leave the memory out; the guest is not paused."),
    ("--quiesce", "With --disk-only: have the guest agent freeze the file systems meanwhile."),
    ("--no-metadata", "Keep no record: the snapshot is not listed and cannot be reverted to."),
    ("--halt", "End the VM's QEMU afterwards."),
    ("--reuse-external", "The overlays' files exist already, with their backing files set."),
    ("--atomic", "Accepted, as snapshots always are."),
    (
        "--validate",
        "Also hold the XML against libvirt's schema, if that is installed (libvirt0). What "
        "qsnapctl does not understand it refuses in any case.",
    ),
)
_OPTIONS = (
    click.option("--strategy", type=_STRATEGIES, help="How, instead of --live."),
    click.option("--image-format", type=_FORMATS, help="Layout of the memory image."),
    click.option(
        "--hash/--no-hash", "hashed", default=True, help="Record the memory image's SHA-256."
    ),
    click.option("--timeout", metavar="S", type=_POSITIVE, help="Time limit of a precopy."),
    click.option(
        "--max-size", metavar="BYTES", type=click.IntRange(min=1), help="Size limit of a precopy."
    ),
    click.option(
        "--on-limit", type=click.Choice(["stop", "abort"]), help="What a precopy does at a limit."
    ),
    click.option(
        "--hold-limit",
        metavar="S",
        type=_POSITIVE,
        help="How long the guest may be held for disks with snapshot=manual.",
    ),
)
"""What virsh does not have."""


def create_options(function: Verb) -> Verb:
    """Add the flags of both verbs that take snapshots."""
    for option in reversed(_OPTIONS):
        function = option(function)
    for flag, text in reversed(_FLAGS):
        function = click.option(flag, is_flag=True, help=text)(function)
    return function


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-create", "domain", "xmlfile?")
    @click.option("--redefine", is_flag=True, help="Take none: define one from what dumpxml wrote.")
    @click.option("--current", is_flag=True, help="With --redefine: make it the current one.")
    @create_options
    def snapshot_create(
        cli: Cli,
        domain: str,
        xmlfile: str | None,
        redefine: bool,
        current: bool,
        **given: Any,  # noqa: ANN401
    ) -> None:
        """Take a snapshot that XML describes; without a file, of everything by default."""
        if current and not redefine:
            raise click.UsageError("--current requires --redefine")
        data = _EMPTY if xmlfile is None else read_xml(xmlfile)
        if given["validate"]:
            validate(data)
        if redefine:
            snapshot = _redefine(cli, domain, data, current=current, given=given)
        else:
            snapshot = _create(cli, domain, _request_of(data), given)
        _report(cli, snapshot, xmlfile)

    @verb(group, "snapshot-create-as", "domain", "name?", "description?", rest="diskspec")
    @click.option("--print-xml", is_flag=True, help="Print the XML that asks for it; do nothing.")
    @click.option(
        "--memspec",
        metavar="[file=]PATH[,snapshot=no|external]",
        help="Where the memory image goes. A comma within is doubled.",
    )
    @click.option(
        "--diskspec",
        metavar="DISK[,snapshot=no|external|manual][,driver=qcow2][,stype=file|block][,file=PATH]",
        multiple=True,
        shell_complete=complete_field("diskspec"),
        help="Leave a disk out, or say where its overlay goes. Repeatable.",
    )
    @create_options
    def snapshot_create_as(
        cli: Cli,
        domain: str,
        name: str | None,
        description: str | None,
        print_xml: bool,
        memspec: str | None,
        diskspec: tuple[str, ...],
        **given: Any,  # noqa: ANN401
    ) -> None:
        """Take a snapshot: memory and disks of one instant, or the disks alone."""
        memory = None if memspec is None else MemSpec.parse(memspec)
        disks = [DiskSpec.parse(spec) for spec in diskspec]
        xml = request_xml(name, description, memory, disks)
        if print_xml:
            click.echo(xml, nl=False)
            return
        if given["validate"]:
            validate(xml.encode())
        request: dict[str, object] = {"name": name, "description": description}
        request |= memory.request() if memory is not None else {}
        wanted = [disk.request() for disk in disks]
        require_each_once(wanted)
        _report(cli, _create(cli, domain, request | {"disks": wanted}, given))


def _create(
    cli: Cli, domain: str, request: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    request = request | {
        "live": given["live"],
        "strategy": given["strategy"],
        "image_format": given["image_format"],
        "hash_memory": given["hashed"],
        "precopy_limit_s": given["timeout"],
        "precopy_limit_bytes": given["max_size"],
        "on_limit": given["on_limit"],
        "disk_only": given["disk_only"] or request.get("disk_only", False),
        "quiesce": given["quiesce"],
        "reuse_overlays": given["reuse_external"],
        "keep_metadata": not given["no_metadata"],
        "halt": given["halt"],
        "hold_limit_s": given["hold_limit"],
    }
    reply = follow(cli, "CreateSnapshot", domain, request)
    if not cli.json:
        print_notes(reply["job"]["notes"])
    snapshot: dict[str, Any] = reply["snapshot"]
    return snapshot


def _request_of(data: bytes) -> dict[str, Any]:
    from qsnapd.xml.request import read_request  # takes a while to import

    return read_request(data).model_dump(mode="json", exclude_unset=True)


def _redefine(
    cli: Cli, domain: str, data: bytes, *, current: bool, given: dict[str, Any]
) -> dict[str, Any]:
    from qsnapd.xml.snapshot import read_snapshot

    for flag in ("no_metadata", "halt", "live"):
        if given[flag]:
            name = flag.replace("_", "-")
            raise click.UsageError(f"--redefine and --{name} are mutually exclusive")
    if given["quiesce"] and not given["disk_only"]:
        raise click.UsageError("--quiesce requires --disk-only")
    manifest = read_snapshot(data)
    if given["disk_only"] and not manifest.is_disk_only:
        raise BadRequest(
            f"disk-only flag for snapshot {manifest.name} requires disk-snapshot state"
        )
    return redefine(cli, domain, manifest.model_dump_json(), current=current)


def redefine(cli: Cli, domain: str, manifest: str, *, current: bool = False) -> dict[str, Any]:
    """Have the daemon take this manifest for a snapshot's; returns that as it is then."""
    snapshot: dict[str, Any] = {}
    with cli.connect() as client:
        # without a limit: a memory image that is another file than it was is read as a whole
        for reply in client.stream(
            "RedefineSnapshot", vm=domain, manifest=manifest, current=current
        ):
            snapshot = reply["snapshot"]
    return snapshot


def validate(data: bytes) -> None:
    """Hold XML against libvirt's schema, if that is there. Raises: BadRequest."""
    from qsnapd.xml import schema

    if not schema.validate(data):
        click.echo(f"note: {schema.SCHEMA} is not installed: not held against it", err=True)


def read_xml(path: str) -> bytes:
    """What the file holds, as far as XML may be long. Raises: TargetRefused."""
    from qsnapd.xml.reading import LIMIT_BYTES

    try:
        with open(path, "rb") as file:
            return file.read(LIMIT_BYTES + 1)
    except OSError as exc:
        raise TargetRefused(f"Failed to open file '{path}': {os.strerror(exc.errno or 0)}") from exc


def _report(cli: Cli, snapshot: dict[str, Any], file: str | None = None) -> None:
    if cli.json:
        print_json(snapshot)
    else:
        origin = f" from '{file}'" if file is not None else ""
        click.echo(f"Domain snapshot {snapshot['name']} created{origin}")
