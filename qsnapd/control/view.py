"""Snapshots as clients see them: the manifest, and its place in the tree."""

from collections.abc import Iterable, Mapping

from pydantic import NonNegativeInt

from qsnapd.model.names import VmName
from qsnapd.model.snapshot import Manifest


class Snapshot(Manifest):
    """One stored snapshot and its place in the VM's tree."""

    current: bool
    """The VM's present state descends from this one."""
    children: NonNegativeInt
    """Snapshots taken directly on top of this one."""
    descendants: NonNegativeInt
    """Its children, their children, and so on."""
    used_by: tuple[VmName, ...] = ()
    """VMs that run on its files right now; their memory may be a mapping of its image."""


def placed(
    manifests: Iterable[Manifest], current: str | None, users: Mapping[str, tuple[str, ...]]
) -> tuple[Snapshot, ...]:
    """Give all manifests of one VM their place, in the order they came in.

    *users*: by snapshot, the VMs that run on it.
    """
    manifests = tuple(manifests)
    children: dict[str, list[str]] = {manifest.name: [] for manifest in manifests}
    for manifest in manifests:
        if manifest.parent in children:
            children[manifest.parent].append(manifest.name)
    return tuple(
        Snapshot(
            **dict(manifest),
            current=manifest.name == current,
            children=len(children[manifest.name]),
            descendants=_count_below(manifest.name, children),
            used_by=users.get(manifest.name, ()),
        )
        for manifest in manifests
    )


def _count_below(name: str, children: dict[str, list[str]]) -> int:
    seen = {name}  # manifests that were changed by hand may go in circles
    pending = list(children[name])  # no recursion: a chain of snapshots can be long
    while pending:
        below = pending.pop()
        if below not in seen:
            seen.add(below)
            pending += children[below]
    return len(seen) - 1
