"""Snapshots' descriptions without their data: written out, taken in, looked for."""

import os
import sys
from typing import Any

import click

from qsnapd.cli.arguments import Cli
from qsnapd.cli.output import print_json, say
from qsnapd.errors import BadRequest, TargetRefused

STANDARD = "-"
_LIMIT_BYTES = 1 << 20
"""What fits into one call."""


def write_description(cli: Cli, domain: str, name: str, target: str, *, as_xml: bool) -> None:
    """Write the manifest, or its XML, to a new file or standard output.

    Raises: TargetRefused: the file exists, or cannot be made.
    """
    from qsnapd.model.snapshot import Manifest  # takes a while to import

    with cli.connect() as client:
        snapshot = client.call("GetSnapshot", vm=domain, name=name)["snapshot"]
    manifest = Manifest.model_validate({key: snapshot[key] for key in Manifest.model_fields})
    if as_xml:
        from qsnapd.xml.snapshot import write_snapshot

        text = write_snapshot(manifest)
    else:
        text = manifest.model_dump_json(indent=1)
    if target == STANDARD:
        click.echo(text.rstrip("\n"))
        return
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")
    except OSError as exc:
        raise TargetRefused(f"cannot create {target}: {exc.strerror}") from exc
    if cli.json:
        print_json({"name": manifest.name, "file": os.path.abspath(target)})
    else:
        click.echo(f"Metadata of domain snapshot {manifest.name} exported to {target}")


def read_description(source: str) -> str:
    """The manifest's text in a file, or on standard input; XML becomes one.

    Raises: TargetRefused: it cannot be read. BadRequest: it is no snapshot's.
    """
    try:
        if source == STANDARD:
            data = sys.stdin.buffer.read(_LIMIT_BYTES + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(_LIMIT_BYTES + 1)
    except OSError as exc:
        raise TargetRefused(f"cannot read {source}: {exc.strerror}") from exc
    if len(data) > _LIMIT_BYTES:
        raise BadRequest(f"{source} is too long for the metadata of a snapshot")
    if data.lstrip().startswith(b"<"):
        from qsnapd.xml.snapshot import read_snapshot

        return read_snapshot(data).model_dump_json()
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise BadRequest(f"{source} is no text") from exc


def print_scan(cli: Cli, result: dict[str, Any]) -> None:
    """Print what a scan has found; exit status 1 if any of it was refused."""
    if cli.json:
        print_json(result)
    else:
        for found in result["found"]:
            why = f": {found['detail']}" if found["detail"] else ""
            say(f"{found['outcome']:<8}  {found['name'] or '?'}  {found['path']}{why}")
            for note in found["notes"]:
                say(f"          note: {note}")
        taken = sum(found["outcome"] == "imported" for found in result["found"])
        click.echo(f"{taken} of {len(result['found'])} snapshots imported")
        if result["current"] is not None:
            click.echo(f"Snapshot {result['current']} is current")
    if any(found["outcome"] == "refused" for found in result["found"]):
        raise click.exceptions.Exit(1)
