"""Command lines as virsh reads them: every positional also has a name, in any order.

`snapshot-create-as vm1 s1`, `--domain vm1 --name s1` and `--name s1 vm1` are the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from qsnapd.cli.completion import complete_field, complete_words
from qsnapd.control.client import Client


@dataclass
class Cli:
    """What the options before the verb say."""

    socket: str
    json: bool = False
    quiet: bool = False

    def connect(self) -> Client:
        return Client(self.socket)


def verb(
    group: click.Group, name: str, *fields: str, rest: str | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Add the decorated function to *group* as verb *name*.

    *fields* are the positionals in their order, "?" marking those that may be missing; what
    they are called decides how a shell completes them. *rest* names a repeatable option that
    takes the words left over. The function gets the `Cli` and then all options by name.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        @click.pass_obj
        def run(cli: Cli, /, words: tuple[str, ...], json: bool, **options: object) -> None:
            cli.json = cli.json or json
            function(cli, **_placed(name, words, fields, rest, options))

        names = [field.rstrip("?") for field in fields]
        for field in names:
            completer = complete_field(field, names)
            run = click.option(f"--{field}", hidden=True, shell_complete=completer)(run)
        run = click.option("--json", is_flag=True, help="Print JSON.")(run)
        metavar = " ".join(f"[{f[:-1]}]" if f.endswith("?") else f for f in fields).upper()
        completer = complete_words(names, rest)
        words = click.argument("words", nargs=-1, metavar=metavar, shell_complete=completer)
        run = words(run)
        return group.command(name)(run)

    return decorate


def _placed(
    name: str,
    words: Sequence[str],
    fields: Sequence[str],
    rest: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Put *words* where nothing stands yet, in order, as virsh does."""
    left = list(words)
    for field in fields:
        key = field.rstrip("?")
        if options[key] is None and left:
            options[key] = left.pop(0)
        if options[key] is None and key == field:
            raise click.UsageError(f"command '{name}' requires <{key}>")
    if rest is not None:
        options[rest] = (*options[rest], *left)
    elif left:
        raise click.UsageError(f"unexpected data '{left[0]}'")
    return options
