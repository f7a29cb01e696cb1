"""The verb that listens."""

import json
from collections.abc import Iterator
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.errors import QsnapError

_KINDS = ("lifecycle", "snapshot", "job")


class _NothingHeard(QsnapError):
    code = "timeout"


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "event", "domain?")
    @click.option("--loop", is_flag=True, help="Go on after the first event.")
    @click.option("--event", "kinds", type=click.Choice(_KINDS), multiple=True, help="Repeatable.")
    @click.option("--all", "all_kinds", is_flag=True, help="Also the progress of jobs.")
    @click.option("--timestamp", is_flag=True, help="Begin each line with the time.")
    @click.option("--timeout", metavar="S", type=click.FloatRange(min=0, min_open=True))
    def event(
        cli: Cli,
        domain: str | None,
        loop: bool,
        kinds: tuple[str, ...],
        all_kinds: bool,
        timestamp: bool,
        timeout: float | None,
    ) -> None:
        """Wait for events and print them.

        One per line; with --json, one object per line. Fails if --timeout ends the waiting
        before there was an event.
        """
        kinds = kinds or (_KINDS if all_kinds else ("lifecycle", "snapshot"))
        count = 0
        try:
            for happened in _events(cli, domain, kinds, timeout):
                count += 1
                click.echo(json.dumps(happened) if cli.json else _line(happened, timestamp))
                if not loop:
                    break
        except KeyboardInterrupt:
            pass  # the way to end a loop
        except TimeoutError:
            if not count:
                raise _NothingHeard(f"no event within {timeout:g} s") from None
        if not cli.json:
            click.echo(f"events received: {count}")


def _events(
    cli: Cli, vm: str | None, kinds: tuple[str, ...], limit_s: float | None
) -> Iterator[dict[str, Any]]:
    """Yield events until TimeoutError."""
    with cli.connect() as client:
        for reply in client.stream("Subscribe", limit_s=limit_s, vm=vm, kinds=list(kinds)):
            if reply["event"] is not None:
                yield reply["event"]


def _line(event: dict[str, Any], timestamp: bool) -> str:
    at = f"{event['at']}: " if timestamp else ""
    what = " ".join(filter(None, [event["event"], event["snapshot"], event["detail"]]))
    lost = f" ({event['lost']} events before it were lost)" if event["lost"] else ""
    return f"{at}event '{event['kind']}' for domain '{event['vm']}': {what}{lost}"
