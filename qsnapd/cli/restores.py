"""Verbs that put VMs back to snapshots."""

from collections.abc import Callable
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.looks import chosen
from qsnapd.cli.output import print_json, print_notes
from qsnapd.errors import BadRequest

Verb = Callable[..., None]


def restore_options(function: Verb) -> Verb:
    """Add the flags of all verbs that start a QEMU from a snapshot."""
    for flag, text in reversed(
        (
            ("--running", "Let the guest run afterwards."),
            ("--paused", "Leave the guest paused."),
            ("--lazy", "Map the memory image; fail where that cannot be."),
            ("--eager", "Read all memory first. By default it is mapped where possible."),
            ("--read-ahead", "Lazy: read the rest of the image in the background."),
            ("--force", "Go on in spite of differences between then and now."),
        )
    ):
        function = click.option(flag, is_flag=True, help=text)(function)
    return function


def restore_request(given: dict[str, bool]) -> dict[str, object]:
    """What these flags ask for. Raises: UsageError: two of them contradict."""
    for one, other in (("running", "paused"), ("lazy", "eager")):
        if given[one] and given[other]:
            raise click.UsageError(f"--{one} and --{other} are mutually exclusive")
    return {
        "state": next((word for word in ("running", "paused") if given[word]), None),
        "memory": next((word for word in ("lazy", "eager") if given[word]), None),
        "read_ahead": given["read_ahead"],
        "force": given["force"],
    }


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-revert", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="To the current snapshot.")
    @restore_options
    @click.option("--reset-nvram", is_flag=True, hidden=True)
    @click.option("--discard", is_flag=True, help="Do not keep the state it is in as a snapshot.")
    def snapshot_revert(
        cli: Cli,
        domain: str,
        snapshotname: str | None,
        current: bool,
        discard: bool,
        reset_nvram: bool,
        **given: bool,
    ) -> None:
        """Put a VM back to a snapshot.

        The state that the VM is in is kept as a snapshot first.
        """
        request = restore_request(given)
        if reset_nvram:
            raise BadRequest(
                "--reset-nvram is not supported: the firmware's variables come back with the "
                "snapshot, or stay as they are"
            )
        name = chosen(cli, domain, snapshotname, current)["name"]
        job = follow(
            cli, "RevertSnapshot", domain, request | {"name": name, "discard": discard}
        )
        _report(cli, job)


def _report(cli: Cli, reply: dict[str, Any]) -> None:
    if cli.json:
        print_json(reply)
        return
    job = reply["job"]
    click.echo(f"Domain snapshot {job['snapshot']} reverted")
    if job["kept"]:
        click.echo(f"The state before is kept as snapshot {job['kept']}")
    print_notes(job["notes"])
