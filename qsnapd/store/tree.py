"""The tree the snapshots of a VM form by their parents: pure functions over manifests.

A parent that is missing, or that would close a circle, is taken for none: every snapshot is
in the tree exactly once, whatever happened to the store.
"""

from collections.abc import Iterator, Mapping

from qsnapd.model.snapshot import Manifest

Manifests = Mapping[str, Manifest]


def parents(manifests: Manifests) -> dict[str, str | None]:
    """Each snapshot's parent within the tree, oldest snapshot first."""
    tree = dict[str, str | None]()
    claimed = set[str | None]()
    for name in sorted(manifests, key=lambda n: (manifests[n].created_at, n)):
        parent = manifests[name].parent
        # A circle is closed only by one that an older one says it comes from.
        ancestor = parent if name in claimed or name == parent else None
        while ancestor is not None and ancestor != name:
            ancestor = tree.get(ancestor)
        broken = parent not in manifests or ancestor == name
        tree[name] = None if broken else parent
        claimed.add(parent)
    return tree


def roots(manifests: Manifests) -> tuple[str, ...]:
    """The snapshots without a parent, oldest first."""
    return tuple(name for name, parent in parents(manifests).items() if parent is None)


def children(manifests: Manifests) -> dict[str, tuple[str, ...]]:
    """Each snapshot's children, oldest first."""
    upward = parents(manifests)
    tree = dict[str, tuple[str, ...]](dict.fromkeys(upward, ()))
    for name, parent in upward.items():
        if parent is not None:
            tree[parent] += (name,)
    return tree


def descendants(manifests: Manifests, name: str) -> tuple[str, ...]:
    """All that come from *name*, itself excluded, parents before children."""
    return tuple(n for n, _ in _walk(children(manifests), (name,)))[1:]


def in_order(manifests: Manifests) -> tuple[tuple[str, int], ...]:
    """Every snapshot with its depth, each right below its parent, siblings oldest first."""
    return tuple(_walk(children(manifests), roots(manifests)))


def _walk(tree: Mapping[str, tuple[str, ...]], tops: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    waiting = [(name, 0) for name in reversed(tops)]
    while waiting:
        name, depth = waiting.pop()
        yield name, depth
        waiting += [(child, depth + 1) for child in reversed(tree[name])]
