"""Verbs that show a VM's disks."""

from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, print_labels, print_table
from qsnapd.errors import BadRequest


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "domblklist", "domain")
    @click.option("--inactive", is_flag=True, help="Accepted: a VM keeps its disks when it ends.")
    @click.option(
        "--details", is_flag=True, help="Also what they are, and what snapshots do with them."
    )
    def domblklist(cli: Cli, domain: str, inactive: bool, details: bool) -> None:
        """List the disks of a VM that runs, and the files behind them."""
        with cli.connect() as client:
            disks = client.call("ListDisks", vm=domain)["disks"]
        if cli.json:
            print_json(disks)
            return
        header, keys = ["Target", "Source"], ["target", "path"]
        if details:
            header = ["Type", "Device", *header, "Format", "Chain", "Snapshot"]
            keys = ["type", "device", *keys, "format", "chain_depth", "left_out"]
        rows = [[disk[key] or _NOTHING.get(key, "-") for key in keys] for disk in disks]
        print_table(header, rows, quiet=cli.quiet)

    @verb(group, "domblkinfo", "domain", "device?")
    @click.option("--all", "every", is_flag=True, help="Of all disks, as a table.")
    def domblkinfo(cli: Cli, domain: str, device: str | None, every: bool) -> None:
        """Print a disk's size in bytes: as the guest sees it, and as its newest image has it."""
        if (device is None) != every:
            raise click.UsageError("either a disk or --all is required")
        with cli.connect() as client:
            disks = client.call("ListDisks", vm=domain)["disks"]
        found = [disk for disk in disks if every or device in (disk["target"], disk["path"])]
        if not found and not every:
            raise BadRequest(f"no disk named '{device}': qsnapctl domblklist {domain} names them")
        if cli.json:
            print_json(found if every else found[0])
        elif every:
            rows = [[disk["target"], *_sizes(disk).values()] for disk in found]
            print_table(("Target", "Capacity", "Allocation", "Physical"), rows, quiet=cli.quiet)
        else:
            print_labels(_sizes(found[0]))


_NOTHING = {"left_out": "external"}


def _sizes(disk: dict[str, Any]) -> dict[str, object]:
    sizes = {
        "Capacity": disk["virtual_size_bytes"],
        "Allocation": disk["allocated_bytes"],
        "Physical": disk["size_bytes"],
    }
    return {label: "-" if size is None else size for label, size in sizes.items()}
