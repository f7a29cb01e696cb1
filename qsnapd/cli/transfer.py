"""Verbs that take snapshots to other hosts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import open_meter
from qsnapd.cli.output import print_json, size
from qsnapd.errors import TargetRefused

_STANDARD = "-"


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-export", "domain", "snapshotname", "directory?")
    @click.option(
        "--tar",
        metavar="[FILE]",
        is_flag=False,
        flag_value=_STANDARD,
        help="As a tar stream, to a new file or standard output.",
    )
    @click.option("--chained", is_flag=True, help="Copy the images of each disk one by one.")
    def snapshot_export(
        cli: Cli,
        domain: str,
        snapshotname: str,
        directory: str | None,
        tar: str | None,
        chained: bool,
    ) -> None:
        """Write a snapshot, complete in itself, to a new directory or as a tar stream."""
        _export(cli, domain, snapshotname, directory, tar, chained)

    @verb(group, "snapshot-cp", "domain", "snapshotname", "directory")
    @click.option("--chained", is_flag=True, help="Copy the images of each disk one by one.")
    def snapshot_cp(
        cli: Cli, domain: str, snapshotname: str, directory: str, chained: bool
    ) -> None:
        """Write a snapshot, complete in itself, to a new directory."""
        _export(cli, domain, snapshotname, directory, None, chained)

    @verb(group, "snapshot-import", "domain", "directory?")
    @click.option(
        "--tar",
        metavar="[FILE]",
        is_flag=False,
        flag_value=_STANDARD,
        help="From a tar stream, out of a file or standard input.",
    )
    @click.option("--name", help="Another name than it had.")
    @click.option(
        "--disk-dir", metavar="DIRECTORY", help="Make the folder with its disks' images there."
    )
    def snapshot_import(
        cli: Cli,
        domain: str,
        directory: str | None,
        tar: str | None,
        name: str | None,
        disk_dir: str | None,
    ) -> None:
        """Make an exported snapshot one of this VM's."""
        _require_one(directory, tar)
        request = {
            "directory": _absolute(directory),
            "name": name,
            "disk_directory": _absolute(disk_dir),
        }
        with _read(tar) as descriptor:
            reply = _follow(cli, "ImportSnapshot", domain, request, name, descriptor)
        if cli.json:
            print_json({"snapshot": reply["snapshot"], "notes": reply["notes"]})
            return
        click.echo(f"Domain snapshot {reply['snapshot']['name']} imported")
        for note in reply["notes"]:
            click.echo(f"note: {note}", err=True)


def _export(
    cli: Cli,
    domain: str,
    snapshotname: str,
    directory: str | None,
    tar: str | None,
    chained: bool,
) -> None:
    _require_one(directory, tar)
    request = {"name": snapshotname, "directory": _absolute(directory), "chained": chained}
    with _written(tar) as descriptor:
        reply = _follow(cli, "ExportSnapshot", domain, request, snapshotname, descriptor)
    if tar == _STANDARD:
        return
    if cli.json:
        print_json(reply["files"])
    else:
        data_bytes = sum(file["data_bytes"] for file in reply["files"])
        where = directory or tar
        click.echo(f"Domain snapshot {snapshotname} exported to {where} ({size(data_bytes)})")


def _require_one(directory: str | None, tar: str | None) -> None:
    if (directory is None) == (tar is None):
        raise click.UsageError("either a directory or --tar is required")


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _follow(
    cli: Cli,
    method: str,
    vm: str,
    request: dict[str, Any],
    name: str | None,
    descriptor: int | None,
) -> dict[str, Any]:
    """Do it, showing on a terminal how far it is; returns the last reply."""
    reply: dict[str, Any] = {}
    with cli.connect() as client, open_meter(cli, name) as meter:
        for reply in client.stream(method, vm=vm, request=request, descriptor=descriptor):
            if progress := reply["progress"]:
                meter.show({**progress, "phase": progress["step"]})
    return reply


@contextmanager
def _written(tar: str | None) -> Iterator[int | None]:
    """Where the stream goes; a file that was made for it is gone if it comes to nothing."""
    if tar is None:
        yield None
    elif tar == _STANDARD:
        if sys.stdout.isatty():
            raise click.UsageError("a tar stream does not go to a terminal: use a pipe or a file")
        yield sys.stdout.fileno()
    else:
        descriptor = _opened(tar, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "create")
        try:
            yield descriptor
        except BaseException:
            os.unlink(tar)
            raise
        finally:
            os.close(descriptor)


@contextmanager
def _read(tar: str | None) -> Iterator[int | None]:
    if tar is None:
        yield None
    elif tar == _STANDARD:
        if sys.stdin.isatty():
            raise click.UsageError("a tar stream is not read from a terminal: use a pipe or a file")
        yield sys.stdin.fileno()
    else:
        descriptor = _opened(tar, os.O_RDONLY, "read")
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _opened(path: str, flags: int, verb: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise TargetRefused(f"cannot {verb} {path}: {exc.strerror}") from exc
