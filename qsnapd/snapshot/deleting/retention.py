"""Which snapshots need not be kept, and in which order they go; pure."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta

from qsnapd.model.request import PruneRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.store.tree import parents


def choose(
    manifests: Mapping[str, Manifest], current: str | None, request: PruneRequest, now: datetime
) -> tuple[str, ...]:
    """The snapshots to delete, in the order in which they should go: the oldest first.

    But one from which several branches come waits for those of them that go as well: what it
    holds would be copied into each.
    """
    doomed = manifests.keys() - kept(manifests, current, request, now)
    upward = parents(manifests)
    branches = Counter(parent for parent in upward.values() if parent is not None)
    if current is not None:
        branches[current] += 1  # the present state
    waiting = sorted(doomed, key=lambda name: (manifests[name].created_at, name))
    order: list[str] = []
    while waiting:
        name = next((name for name in waiting if branches[name] < 2), waiting[0])
        waiting.remove(name)
        order.append(name)
        # Its children become its parent's.
        parent = upward.pop(name)
        if parent is not None:
            branches[parent] += branches[name] - 1
        for child, its_parent in upward.items():
            if its_parent == name:
                upward[child] = parent
    return tuple(order)


def kept(
    manifests: Mapping[str, Manifest], current: str | None, request: PruneRequest, now: datetime
) -> frozenset[str]:
    """The snapshots that stay: the current one, the newest, and what is not old enough.

    One whose deletion was broken off cannot be restored, so that only being current keeps it.
    """
    whole = [name for name, manifest in manifests.items() if not manifest.deleting]
    whole.sort(key=lambda name: (manifests[name].created_at, name))
    newest = whole[-request.keep_last :]
    within: list[str] = []
    if request.keep_within_s is not None:
        age = timedelta(seconds=min(request.keep_within_s, timedelta.max.total_seconds() / 2))
        within = [name for name in whole if now - manifests[name].created_at <= age]
    return frozenset((*newest, *within, *((current,) if current in manifests else ())))
