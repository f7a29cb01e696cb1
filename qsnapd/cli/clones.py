"""Verbs that make VMs out of snapshots, and forget them."""

import os

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.output import print_json, say
from qsnapd.cli.restores import restore_options, restore_request

IDENTITIES = click.Choice(["new", "keep"])


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-clone", "domain", "snapshotname", "newname")
    @restore_options
    @click.option("--qmp", metavar="PATH", help="Where the new VM's monitor listens.")
    @click.option("--mac", type=IDENTITIES, default="new", help="MAC addresses (default: new).")
    @click.option("--uuid", type=IDENTITIES, default="new", help="UUID (default: new).")
    @click.option(
        "--substitute",
        metavar="OLD=NEW",
        multiple=True,
        help="Use NEW where the original uses the interface, device, socket or port OLD.",
    )
    def snapshot_clone(
        cli: Cli,
        domain: str,
        snapshotname: str,
        newname: str,
        qmp: str | None,
        mac: str,
        uuid: str,
        substitute: tuple[str, ...],
        **given: bool,
    ) -> None:
        """Start another VM from a snapshot, beside the one it was taken of.

        It has disks, sockets and files of its own. A guest finds a new MAC address or UUID
        once it has been reset; a new generation id (vmgenid) at once.
        """
        request = restore_request(given) | {
            "name": snapshotname,
            "clone": newname,
            "qmp": os.path.abspath(qmp) if qmp else None,
            "mac": mac,
            "uuid": uuid,
            "substitutes": substitutes(substitute),
        }
        reply = follow(cli, "CloneSnapshot", domain, request)
        if cli.json:
            print_json(reply)
            return
        click.echo(f"Domain {newname} cloned from {domain} at {snapshotname}")
        for note in reply["job"]["notes"]:
            say(f"  {note}")

    @verb(group, "undefine", "domain")
    @click.option(
        "--remove-storage", "--remove-all-storage", is_flag=True, help="Its disks' files, too."
    )
    def undefine(cli: Cli, domain: str, remove_storage: bool) -> None:
        """Forget a clone that is shut off."""
        with cli.connect() as client:
            reply = client.call("UndefineVm", vm=domain, remove_storage=remove_storage)
        if cli.json:
            print_json(reply)
            return
        click.echo(f"Domain '{domain}' has been undefined")
        for path in reply["removed"]:
            click.echo(f"  removed {path}")


def substitutes(words: tuple[str, ...]) -> dict[str, str]:
    """Read OLD=NEW. Raises: UsageError."""
    pairs = {}
    for word in words:
        old, equals, new = word.partition("=")
        if not (old and equals and new):
            raise click.UsageError(f"--substitute {word}: it must be OLD=NEW")
        pairs[old] = new
    return pairs
