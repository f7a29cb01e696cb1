"""Verbs for the file systems in a guest, through its agent."""

from collections.abc import Sequence

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, print_table
from qsnapd.control.client import Reply
from qsnapd.errors import BadRequest


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "domfsfreeze", "domain", rest="mountpoint")
    @click.option(
        "--mountpoint", multiple=True, metavar="PATH", help="Only what is mounted there."
    )
    def domfsfreeze(cli: Cli, domain: str, mountpoint: tuple[str, ...]) -> None:
        """Freeze a VM's mounted file systems, until domfsthaw."""
        reply = _ask(cli, "FreezeFilesystems", domain, mountpoints=mountpoint)
        if cli.json:
            print_json(reply)
        else:
            click.echo(f"Froze {reply['filesystems']} filesystem(s)")

    @verb(group, "domfsthaw", "domain", rest="mountpoint")
    @click.option("--mountpoint", multiple=True, metavar="PATH", hidden=True)
    def domfsthaw(cli: Cli, domain: str, mountpoint: tuple[str, ...]) -> None:
        """Thaw a VM's file systems, all of them."""
        if mountpoint:
            raise BadRequest(
                "specifying mountpoints is not supported: guest agents thaw all that is frozen"
            )
        reply = _ask(cli, "ThawFilesystems", domain)
        if cli.json:
            print_json(reply)
        else:
            click.echo(f"Thawed {reply['filesystems']} filesystem(s)")

    @verb(group, "domfsinfo", "domain")
    def domfsinfo(cli: Cli, domain: str) -> None:
        """List a VM's mounted file systems; the target is the guest's name of the disk."""
        found = _ask(cli, "ListFilesystems", domain)["filesystems"]
        if cli.json:
            print_json(found)
        elif not found:
            click.echo("No filesystems are mounted in the domain")
        else:
            print_table(
                ("Mountpoint", "Name", "Type", "Target"),
                (
                    (one["mountpoint"], one["name"], one["type"], ",".join(_targets(one)))
                    for one in found
                ),
            )


def _ask(cli: Cli, method: str, vm: str, **parameters: Sequence[str]) -> Reply:
    """Call a method that takes as long as the guest's agent; leaving takes it back."""
    with cli.connect() as client:
        *_, reply = client.stream(method, limit_s=None, descriptor=None, vm=vm, **parameters)
        return reply


def _targets(filesystem: Reply) -> list[str]:
    return [device.removeprefix("/dev/") for device in filesystem["devices"]]
