"""How results look: virsh's tables, labels and trees, or JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import click


def printable(words: object, keep: str = "") -> str:
    """*words* without what could steer a terminal, as virsh does it in its tables.

    They may come from a guest, whose administrator is not the host's.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(words)
    )


def say(words: str, *, err: bool = False) -> None:
    """Print lines that others have had a part in."""
    click.echo(printable(words, "\n\t"), err=err)


def print_notes(notes: Iterable[str]) -> None:
    """Print what else there is to know, where it is in no script's way."""
    for note in notes:
        say(f"note: {note}", err=True)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, quiet: bool = False
) -> None:
    """Print a table like virsh's, an empty line after it; *quiet*: without its header."""
    table = [[printable(cell) for cell in row] for row in rows]
    if not quiet:
        table.insert(0, list(header))
    widths = [max((len(row[column]) for row in table), default=0) for column in range(len(header))]
    lines = [
        "".join(f" {cell:<{width + 2}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    if not quiet:
        lines.insert(1, "-" * (sum(widths) + 3 * len(widths)))
    click.echo("\n".join([*lines, ""]))


def print_labels(labels: Mapping[str, object], width: int = 15) -> None:
    """Print one `Label:   value` per line; what is None is left out."""
    for label, value in labels.items():
        if value is not None:
            click.echo(f"{label + ':':<{width}} {printable(value)}")


def print_tree(parents: Mapping[str, str | None]) -> None:
    """Print names below their parents, one tree per root, as virsh does.

    *parents* maps each name to its parent; a parent that is not a key makes a root.
    """
    children: dict[str | None, list[str]] = {}
    for name, parent in sorted(parents.items(), key=lambda item: item[0].lower()):
        children.setdefault(parent if parent in parents else None, []).append(name)
    for root in children.get(None, []):
        click.echo("\n".join(_branch(root, children)))
        click.echo()


def _branch(root: str, children: Mapping[str | None, Sequence[str]]) -> list[str]:
    lines = [root]
    # No recursion, as chains can be long: (name, what stands before it, is it the last).
    pending: list[tuple[str, str, bool]] = []

    def descend(name: str, indent: str) -> bool:
        kids = children.get(name, ())
        if kids:
            lines.append(f"{indent}|")
        pending.extend((kid, indent, kid == kids[-1]) for kid in reversed(kids))
        return bool(kids)

    descend(root, "  ")
    while pending:
        name, indent, last = pending.pop()
        lines.append(f"{indent}+- {name}")
        if not descend(name, indent + ("    " if last else "|   ")) and last:
            lines.append(indent.rstrip())
    while not lines[-1]:
        lines.pop()
    return lines


def local_time(iso: str) -> str:
    """Show a stored time in the caller's time zone, as virsh does."""
    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def size(size_bytes: float) -> str:
    """Show a size with three digits after the point, as virsh does."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size_bytes >= 1024 and len(units) > 1:
        size_bytes /= 1024
        del units[0]
    return f"{size_bytes:.3f} {units[0]}"
