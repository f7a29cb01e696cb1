"""Command lines as virsh reads them: every positional also has a name, in any order.

`snapshot-create-as vm1 s1`, `--domain vm1 --name s1` and `--name s1 vm1` are the same.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from qsnapd.control.client import Client


@dataclass
class Cli:
    """What the options before the verb say."""

    socket: str
    json: bool = False

    def connect(self) -> Client:
        return Client(self.socket)


def verb(
    group: click.Group, name: str, *fields: str, rest: str | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Add the decorated function to *group* as verb *name*.

    *fields* are the positionals in their order, "?" marking those that may be missing;
    *rest* names a repeatable option that takes the words left over. The function gets the
    `Cli` and then all options by name.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        @click.pass_obj
        def run(cli: Cli, /, words: tuple[str, ...], json: bool, **options: object) -> None:
            cli.json = cli.json or json
            function(cli, **_placed(name, words, fields, rest, options))

        for field in fields:
            run = click.option(f"--{field.rstrip('?')}", hidden=True)(run)
        run = click.option("--json", is_flag=True, help="Print JSON.")(run)
        metavar = " ".join(f"[{f[:-1]}]" if f.endswith("?") else f for f in fields).upper()
        run = click.argument("words", nargs=-1, metavar=metavar)(run)
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


def parse_memspec(spec: str) -> str:
    """Return the absolute path in a virsh memspec, `[file=]PATH[,snapshot=external]`."""
    first, *others = _split(spec)
    if "=" not in first or first.startswith("/"):
        first = f"file={first}"
    values = _values("memspec", spec, [first, *others], known=("file", "snapshot"))
    if values.get("snapshot", "external") != "external":
        raise click.UsageError(f"memspec {spec}: memory is always saved in a file of its own")
    if not values.get("file"):
        raise click.UsageError(f"memspec {spec}: no file is named")
    return os.path.abspath(values["file"])


def parse_diskspec(spec: str) -> dict[str, str]:
    """Return a DiskRequest from a virsh diskspec, `TARGET[,snapshot=no|external][,file=PATH]`."""
    target, *others = _split(spec)
    known = ("snapshot", "file", "driver", "stype")
    values = _values("diskspec", spec, others, known=known)
    if values.get("snapshot", "external") not in ("external", "no"):
        raise click.UsageError(f"diskspec {spec}: snapshot is either external or no")
    if values.pop("driver", "qcow2") != "qcow2" or values.pop("stype", "file") != "file":
        raise click.UsageError(f"diskspec {spec}: overlays are qcow2 files")
    if not target:
        raise click.UsageError(f"diskspec {spec}: no disk is named")
    if "file" in values:
        values["file"] = os.path.abspath(values["file"])
    return {"target": os.path.abspath(target) if "/" in target else target, **values}


def _split(spec: str) -> list[str]:
    """Split at commas; a doubled one stands for itself."""
    return [part.replace("\0", ",") for part in spec.replace(",,", "\0").split(",")]


def _values(what: str, spec: str, parts: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in known or key in values:
            raise click.UsageError(f"unable to parse {what}: {spec}")
        values[key] = value
    return values
