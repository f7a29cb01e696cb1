"""Which snapshots a list shows, and in which order: virsh's rules, over the daemon's replies.

A parent that is not in the list, or that would close a circle, counts as none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import click

Snapshot = dict[str, Any]
Flags = Mapping[str, bool]

EXCLUSIVE = (
    ("tree", "name"),
    ("parent", "roots"),
    ("parent", "tree"),
    ("roots", "tree"),
    ("roots", "from"),
    ("roots", "current"),
)
NOT_IN_A_TREE = (
    *("leaves", "no-leaves", "inactive", "active", "disk-only", "internal", "external"),
)

_GROUPS: tuple[dict[str, Callable[[Snapshot], bool]], ...] = (
    {"metadata": lambda s: True, "no-metadata": lambda s: False},
    {"leaves": lambda s: not s["children"], "no-leaves": lambda s: s["children"] > 0},
    {
        "inactive": lambda s: False,  # a VM that is shut off has nothing that could be asked
        "active": lambda s: s["strategy"] is not None,
        "disk-only": lambda s: s["strategy"] is None,
    },
    {"internal": lambda s: False, "external": lambda s: True},
)
"""In each group: whether a flag of it wants the snapshot. A group without a flag wants all."""


def require_sense(given: Flags) -> None:
    """Raise UsageError, in virsh's words, if the flags in *given* contradict each other."""
    for one, other in EXCLUSIVE:
        if given[one] and given[other]:
            raise click.UsageError(f"Options --{one} and --{other} are mutually exclusive")
    for flag in NOT_IN_A_TREE:
        if given["tree"] and given[flag]:
            raise click.UsageError(f"--{flag} and --tree are mutually exclusive")
    if given["from"] and given["current"]:
        raise click.UsageError("--from and --current are mutually exclusive")
    if given["descendants"] and not (given["from"] or given["current"]):
        raise click.UsageError("--descendants requires either --from or --current")


def listed(
    snapshots: Iterable[Snapshot], given: Flags, start: str | None = None
) -> list[Snapshot]:
    """The snapshots that *given* asks for, sorted by name whatever its case.

    *start*: only those that come from it; not itself, except in a tree.
    """
    in_order = sorted(snapshots, key=lambda s: (s["name"].lower(), s["name"]))
    by_name = {snapshot["name"]: snapshot for snapshot in in_order}
    parents = parents_within(by_name.values())
    if start is None:
        wanted = set(by_name)
    elif given["tree"]:
        wanted = {start, *_below(start, parents)}
    elif given["descendants"]:
        wanted = _below(start, parents)
    else:
        wanted = {name for name, parent in parents.items() if parent == start}
    if given["roots"]:
        wanted &= {name for name, parent in parents.items() if parent is None}
    names = _parents_first(by_name, parents) if given["topological"] else by_name
    return [by_name[n] for n in names if n in wanted and _passes(by_name[n], given)]


def parents_within(snapshots: Iterable[Snapshot]) -> dict[str, str | None]:
    """The parent of each of *snapshots*, if it is one of them too."""
    recorded: dict[str, str | None] = {s["name"]: s["parent"] for s in snapshots}
    parents: dict[str, str | None] = {}
    for name, parent in recorded.items():
        ancestor = parent
        while ancestor is not None and ancestor != name:
            ancestor = parents.get(ancestor)
        parents[name] = parent if parent in recorded and ancestor != name else None
    return parents


def state_of(snapshot: Snapshot) -> str:
    """virsh's word for what was saved; one that is being deleted cannot be restored."""
    if snapshot["deleting"]:
        return "deleting"
    return "disk-snapshot" if snapshot["strategy"] is None else str(snapshot["state"])


def _passes(snapshot: Snapshot, given: Flags) -> bool:
    for group in _GROUPS:
        asked = [wants for flag, wants in group.items() if given[flag]]
        if asked and not any(wants(snapshot) for wants in asked):
            return False
    return True


def _below(start: str, parents: Mapping[str, str | None]) -> set[str]:
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = [name for name in children.get(waiting.pop(), ()) if name not in {start, *found}]
        found.update(new)
        waiting += new
    return found


def _parents_first(names: Iterable[str], parents: Mapping[str, str | None]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        line: list[str] = []
        step: str | None = name
        while step is not None and step not in seen:
            seen.add(step)
            line.append(step)
            step = parents[step]
        yield from reversed(line)
