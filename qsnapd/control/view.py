"""Snapshots as clients see them: the manifest, and its place in the tree."""

from collections.abc import Iterable, Mapping

from pydantic import NonNegativeInt

from qsnapd.model.names import VmName
from qsnapd.model.snapshot import Manifest
from qsnapd.store import tree


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
    known = {manifest.name: manifest for manifest in manifests}
    parents, children = tree.parents(known), tree.children(known)
    descendants = dict.fromkeys(known, 0)
    for name, _ in reversed(tree.in_order(known)):  # children before their parents
        if (parent := parents[name]) is not None:
            descendants[parent] += 1 + descendants[name]
    return tuple(
        # All of it has been validated: to do so again would be most of the work.
        Snapshot.model_construct(
            **dict(manifest),
            current=name == current,
            children=len(children[name]),
            descendants=descendants[name],
            used_by=users.get(name, ()),
        )
        for name, manifest in known.items()
    )
