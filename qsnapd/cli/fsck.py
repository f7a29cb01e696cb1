"""The verb that holds snapshots, their files and the running VM against each other."""

from collections import Counter
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, say


def add_to(group: click.Group) -> None:
    """Add the verb of this module."""

    @verb(group, "snapshot-fsck", "domain")
    @click.option(
        "--repair",
        is_flag=True,
        help="Remove what a crash has left over: unfinished files of ours, records of what is "
        "gone. Nothing that a snapshot or a disk consists of is touched.",
    )
    def snapshot_fsck(cli: Cli, domain: str, repair: bool) -> None:
        """Say what does not fit together, and how to mend it; exit status 1 if anything does not.

        Looks at the records in the store, the files that they name, and the disks of the VM, if
        it runs. Contents are not read: that is snapshot-verify's.
        """
        method = "RepairStore" if repair else "CheckStore"
        found: dict[str, Any] = {}
        with cli.connect() as client:
            for reply in client.stream(method, vm=domain):
                found = reply["check"]
        if cli.json:
            print_json(found)
        else:
            _print(found)
        if not found["clean"]:
            raise click.exceptions.Exit(1)


def _print(found: dict[str, Any]) -> None:
    for finding in found["findings"]:
        say(f"{finding['severity']}: {finding['code']}: {finding['what']}")
        say(f"    {'repaired' if finding['repaired'] else finding['mend']}")
    for words in found["skipped"]:
        say(f"skipped: {words}")
    click.echo(f"Domain {found['vm']} {_verdict(found)}")


def _verdict(found: dict[str, Any]) -> str:
    counts = Counter(f["severity"] for f in found["findings"] if not f["repaired"])
    counts["repaired"] = sum(f["repaired"] for f in found["findings"])
    words = [
        f"{counts[kind]} {kind}{'s' if counts[kind] > 1 and kind != 'repaired' else ''}"
        for kind in ("error", "warning", "note", "repaired")
        if counts[kind]
    ]
    if not found["clean"]:
        return f"is not in order: {', '.join(words)}"
    details = f" ({', '.join(words)})" if words else ""
    return f"is in order{' as far as it was looked at' if found['skipped'] else ''}{details}"
