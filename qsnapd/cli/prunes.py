"""The verb that deletes the snapshots that need not be kept."""

import re

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.output import print_json, print_notes, say

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(_context: click.Context, _option: click.Parameter, words: str | None) -> float | None:
    """What a duration amounts to: a number and its unit. Raises: BadParameter: it is none."""
    if words is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", words, re.ASCII)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{words!r} is no duration: say 90s, 15m, 36h, 7d or 4w")
    return float(found[1]) * _UNITS_S[found[2]]


def add_to(group: click.Group) -> None:
    """Add the verb of this module."""

    @verb(group, "snapshot-prune", "domain")
    @click.option(
        "--keep-last",
        type=click.IntRange(min=1),
        required=True,
        metavar="N",
        help="Keep the N newest.",
    )
    @click.option(
        "--keep-within",
        callback=seconds,
        metavar="DURATION",
        help="Keep those not older than that as well: 90s, 15m, 36h, 7d, 4w.",
    )
    @click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
    def snapshot_prune(
        cli: Cli, domain: str, keep_last: int, keep_within: float | None, dry_run: bool
    ) -> None:
        """Delete the snapshots that need not be kept.

        The oldest go first, as by snapshot-delete. The current snapshot always stays, and so
        does one that cannot be deleted now, because a clone runs on it for example: a note
        says why. domjobabort ends it; what is deleted by then is gone.
        """
        request: dict[str, object] = {"keep_last": keep_last, "keep_within_s": keep_within}
        if dry_run:
            with cli.connect() as client:
                reply = client.call("PruneSnapshots", vm=domain, request=request, dry_run=True)
        else:
            reply = follow(cli, "PruneSnapshots", domain, request)
        if cli.json:
            print_json(reply)
            return
        pruned = reply["pruned"]
        for name in pruned["deleted"]:
            say(f"Domain snapshot {name} {'would be ' if dry_run else ''}deleted")
        print_notes(f"snapshot {it['name']} stays: {it['why']}" for it in pruned["refused"])
        if reply["job"]:
            print_notes(reply["job"]["notes"])
