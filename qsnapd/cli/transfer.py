"""Verbs that take snapshots to other hosts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.descriptions import STANDARD, print_scan, read_description, write_description
from qsnapd.cli.jobs import open_meter
from qsnapd.cli.output import print_json, print_notes, size
from qsnapd.errors import TargetRefused


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-export", "domain", "snapshotname", "directory?")
    @click.option(
        "--tar",
        metavar="[FILE]",
        is_flag=False,
        flag_value=STANDARD,
        help="As a tar stream, to a new file or standard output.",
    )
    @click.option("--chained", is_flag=True, help="Copy the images of each disk one by one.")
    @click.option(
        "--metadata",
        metavar="[FILE]",
        is_flag=False,
        flag_value=STANDARD,
        help="Its manifest alone, without data, to a new file or standard output.",
    )
    @click.option(
        "--xml", metavar="[FILE]", is_flag=False, flag_value=STANDARD, help="The same as XML."
    )
    def snapshot_export(
        cli: Cli,
        domain: str,
        snapshotname: str,
        directory: str | None,
        tar: str | None,
        chained: bool,
        metadata: str | None,
        xml: str | None,
    ) -> None:
        """Write a snapshot, complete in itself, to a new directory or as a tar stream."""
        _require_one(directory=directory, tar=tar, metadata=metadata, xml=xml)
        if (target := metadata or xml) is not None:
            if chained:
                raise click.UsageError("--chained is for images of disks: there are none here")
            write_description(cli, domain, snapshotname, target, as_xml=xml is not None)
            return
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
        flag_value=STANDARD,
        help="From a tar stream, out of a file or standard input.",
    )
    @click.option("--name", help="Another name than it had.")
    @click.option(
        "--disk-dir", metavar="DIRECTORY", help="Make the folder with its disks' images there."
    )
    @click.option(
        "--metadata",
        metavar="[FILE]",
        is_flag=False,
        flag_value=STANDARD,
        help="A manifest alone (JSON or XML), whose files are where it says.",
    )
    @click.option(
        "--scan",
        metavar="DIRECTORY",
        help="All snapshots of this VM that lie below it and are whole: a former state "
        "directory, kept manifests, exports.",
    )
    def snapshot_import(
        cli: Cli,
        domain: str,
        directory: str | None,
        tar: str | None,
        name: str | None,
        disk_dir: str | None,
        metadata: str | None,
        scan: str | None,
    ) -> None:
        """Make an exported snapshot one of this VM's."""
        _require_one(directory=directory, tar=tar, metadata=metadata, scan=scan)
        if disk_dir is not None and (metadata or scan):
            raise click.UsageError("--disk-dir is for disks that are copied: there are none here")
        if name is not None and scan:
            raise click.UsageError("--scan takes snapshots in by the names they have")
        if scan is not None:
            reply = _follow(cli, "ScanSnapshots", domain, None, {"directory": _absolute(scan)})
            print_scan(cli, reply["result"])
            return
        if metadata is not None:
            call = {"manifest": read_description(metadata), "name": name}
            _tell_imported(cli, _follow(cli, "ImportMetadata", domain, name, call))
            return
        request = {
            "directory": _absolute(directory),
            "name": name,
            "disk_directory": _absolute(disk_dir),
        }
        with _read(tar) as descriptor:
            reply = _follow(
                cli, "ImportSnapshot", domain, name, {"request": request}, descriptor
            )
        _tell_imported(cli, reply)


def _tell_imported(cli: Cli, reply: dict[str, Any]) -> None:
    if cli.json:
        print_json({"snapshot": reply["snapshot"], "notes": reply["notes"]})
        return
    click.echo(f"Domain snapshot {reply['snapshot']['name']} imported")
    print_notes(reply["notes"])


def _export(
    cli: Cli,
    domain: str,
    snapshotname: str,
    directory: str | None,
    tar: str | None,
    chained: bool,
) -> None:
    request = {"name": snapshotname, "directory": _absolute(directory), "chained": chained}
    with _written(tar) as descriptor:
        call = {"request": request}
        reply = _follow(cli, "ExportSnapshot", domain, snapshotname, call, descriptor)
    if tar == STANDARD:
        return
    if cli.json:
        print_json(reply["files"])
    else:
        data_bytes = sum(file["data_bytes"] for file in reply["files"])
        where = directory or tar
        click.echo(f"Domain snapshot {snapshotname} exported to {where} ({size(data_bytes)})")


def _require_one(**ways: str | None) -> None:
    if sum(way is not None for way in ways.values()) != 1:
        names = ["a directory", *(f"--{name}" for name in ways if name != "directory")]
        raise click.UsageError(f"one of these is required: {', '.join(names)}")


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _follow(
    cli: Cli,
    method: str,
    vm: str,
    name: str | None,
    call: dict[str, Any],
    descriptor: int | None = None,
) -> dict[str, Any]:
    """Do it, showing on a terminal how far it is; returns the last reply."""
    reply: dict[str, Any] = {}
    with cli.connect() as client, open_meter(cli, name) as meter:
        for reply in client.stream(method, vm=vm, **call, descriptor=descriptor):
            if progress := reply["progress"]:
                meter.show({**progress, "phase": progress["step"]})
    return reply


@contextmanager
def _written(tar: str | None) -> Iterator[int | None]:
    """Where the stream goes; a file that was made for it is gone if it comes to nothing."""
    if tar is None:
        yield None
    elif tar == STANDARD:
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
    elif tar == STANDARD:
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
