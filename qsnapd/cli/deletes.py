"""The verb that deletes snapshots."""

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.looks import chosen
from qsnapd.cli.output import print_json, print_notes


def add_to(group: click.Group) -> None:
    """Add the verb of this module."""

    @verb(group, "snapshot-delete", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="The current snapshot.")
    @click.option("--children", is_flag=True, help="And all that come from it.")
    @click.option("--children-only", is_flag=True, help="All that come from it; it stays.")
    @click.option("--metadata", is_flag=True, help="Forget it, and leave all its files alone.")
    def snapshot_delete(
        cli: Cli,
        domain: str,
        snapshotname: str | None,
        current: bool,
        children: bool,
        children_only: bool,
        metadata: bool,
    ) -> None:
        """Delete a snapshot; what was written after it stays.

        The VM goes on as it is. What was written later is merged into the older image; that
        can be aborted (domjobabort) until the VM is switched to the merged images.
        """
        if children and children_only:
            raise click.UsageError("--children and --children-only are mutually exclusive")
        name = chosen(cli, domain, snapshotname, current)["name"]
        descendants = "only" if children_only else "too" if children else "none"
        request = {"name": name, "descendants": descendants, "metadata_only": metadata}
        reply = follow(cli, "DeleteSnapshot", domain, request)
        if cli.json:
            print_json(reply)
            return
        what = f"{name} children" if children_only else name
        click.echo(f"Domain snapshot {what} deleted")
        print_notes(reply["job"]["notes"])
