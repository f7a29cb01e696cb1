"""The verb that looks whether a snapshot is sound."""

from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.looks import chosen
from qsnapd.cli.output import print_json, say


def add_to(group: click.Group) -> None:
    """Add the verb of this module."""

    @verb(group, "snapshot-verify", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="The current snapshot.")
    @click.option(
        "--deep", is_flag=True, help="Also load its memory into a QEMU that never runs."
    )
    def snapshot_verify(
        cli: Cli, domain: str, snapshotname: str | None, current: bool, deep: bool
    ) -> None:
        """Say whether a snapshot is sound; exit status 1 if anything is wrong."""
        name = chosen(cli, domain, snapshotname, current)["name"]
        found: dict[str, Any] = {}
        with cli.connect() as client:
            for reply in client.stream("VerifySnapshot", vm=domain, name=name, deep=deep):
                found = reply["verification"]
        if cli.json:
            print_json(found)
        else:
            for check in found["checks"]:
                say(f"{check['what'] + ':':<16} {check['outcome']:<9}  {check['detail']}")
            click.echo(f"Domain snapshot {name} {_verdict(found)}")
        if not found["sound"]:
            raise click.exceptions.Exit(1)


def _verdict(found: dict[str, Any]) -> str:
    if not found["sound"]:
        return "is damaged"
    in_part = any(check["outcome"] == "unchecked" for check in found["checks"])
    return "is sound as far as it was checked" if in_part else "is sound"
