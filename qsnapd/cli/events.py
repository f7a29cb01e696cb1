"""The verb that listens."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import say
from qsnapd.errors import QsnapError

_KINDS = ("lifecycle", "snapshot", "job")


class _NothingHeard(QsnapError):
    code = "timeout"


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "event", "domain?", rest="event")
    @click.option("--loop", is_flag=True, help="Go on after the first event.")
    @click.option("--event", metavar="KIND", multiple=True, help="Only such; repeatable.")
    @click.option("--list", "list_kinds", is_flag=True, help="Print the kinds of events.")
    @click.option("--all", "all_kinds", is_flag=True, help="Also the progress of jobs.")
    @click.option("--timestamp", is_flag=True, help="Begin each line with the time.")
    @click.option("--timeout", metavar="S", type=click.FloatRange(min=0, min_open=True))
    def event(
        cli: Cli,
        domain: str | None,
        event: tuple[str, ...],
        loop: bool,
        list_kinds: bool,
        all_kinds: bool,
        timestamp: bool,
        timeout: float | None,
    ) -> None:
        """Wait for events and print them: by default those of VMs and snapshots.

        One per line; with --json, one object per line. Fails if --timeout ends the waiting
        before there was an event.
        """
        _require_sense(event, list_kinds, all_kinds)
        if list_kinds:
            click.echo("\n".join(_KINDS))
            return
        kinds = event or (_KINDS if all_kinds else ("lifecycle", "snapshot"))
        count, end = 0, None
        try:
            for happened in _events(cli, domain, kinds, timeout):
                count += 1
                click.echo(json.dumps(happened)) if cli.json else say(_line(happened, timestamp))
                if not loop:
                    break
        except KeyboardInterrupt:
            end = "event loop interrupted"  # the way to end a loop
        except TimeoutError:
            end = "event loop timed out"
            if cli.json and not count:
                raise _NothingHeard(f"no event within {timeout:g} s") from None
        if not cli.json:
            click.echo("\n".join(filter(None, [end, f"events received: {count}"])))
        if not count:
            raise click.exceptions.Exit(1)


def _require_sense(kinds: tuple[str, ...], list_kinds: bool, all_kinds: bool) -> None:
    for one, one_given, other, other_given in (
        ("list", list_kinds, "all", all_kinds),
        ("list", list_kinds, "event", kinds),
        ("all", all_kinds, "event", kinds),
    ):
        if one_given and other_given:
            raise click.UsageError(f"Options --{one} and --{other} are mutually exclusive")
    for kind in kinds:
        if kind not in _KINDS:
            raise click.UsageError(f"unknown event type {kind}; there are: {', '.join(_KINDS)}")


def _events(
    cli: Cli, vm: str | None, kinds: tuple[str, ...], limit_s: float | None
) -> Iterator[dict[str, Any]]:
    """Yield events until TimeoutError."""
    with cli.connect() as client:
        for reply in client.stream("Subscribe", limit_s=limit_s, vm=vm, kinds=list(kinds)):
            if reply["event"] is not None:
                yield reply["event"]


def _line(event: dict[str, Any], timestamp: bool) -> str:
    at = f"{_virsh_time(event['at'])}: " if timestamp else ""
    what = " ".join(filter(None, [event["event"], event["snapshot"], _detail(event)]))
    lost = f" ({event['lost']} events before it were lost)" if event["lost"] else ""
    return f"{at}event '{event['kind']}' for domain '{event['vm']}': {what}{lost}"


def _detail(event: dict[str, Any]) -> str:
    job = event["job"]
    if event["kind"] == "job" and job["total_bytes"]:
        return f"{job['percent']:.1f} %"
    return str(event["detail"])


def _virsh_time(iso: str) -> str:
    at = datetime.fromisoformat(iso).astimezone(UTC)
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}+0000"
