"""The verb for the snapshot that a VM's present state descends from."""

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.looks import current_of
from qsnapd.cli.metadata import as_xml
from qsnapd.cli.output import print_json


def add_to(group: click.Group) -> None:
    """Add the verb of this module."""

    @verb(group, "snapshot-current", "domain", "snapshotname?")
    @click.option("--name", "only_name", is_flag=True, help="Its name only.")
    @click.option(
        "--security-info",
        is_flag=True,
        help="Accepted: the recorded command line is always complete, with all that it says.",
    )
    def snapshot_current(
        cli: Cli, domain: str, snapshotname: str | None, only_name: bool, security_info: bool
    ) -> None:
        """Print the snapshot that a VM descends from, as XML, or say which one that is.

        With SNAPSHOTNAME the VM itself is not touched: only what comes next counts as taken
        on top of that one.
        """
        if snapshotname is not None:
            if only_name:
                raise click.UsageError("Options --name and --snapshotname are mutually exclusive")
            _set(cli, domain, snapshotname)
            return
        snapshot = current_of(cli, domain)
        if cli.json:
            print_json(snapshot)
        else:
            click.echo(snapshot["name"] if only_name else as_xml(snapshot), nl=only_name)


def _set(cli: Cli, domain: str, name: str) -> None:
    with cli.connect() as client:
        snapshot = client.call("SetCurrentSnapshot", vm=domain, name=name)["snapshot"]
    print_json(snapshot) if cli.json else click.echo(f"Snapshot {name} set as current")
