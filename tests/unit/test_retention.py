"""What retention keeps, and in which order the rest goes."""

from collections.abc import Mapping
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.model.request import PruneRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.deleting.retention import choose, kept
from qsnapd.store.tree import parents
from tests.unit.control_host import NOW, manifest

Tree = Mapping[str, Manifest]


def tree(*edges: str, deleting: str = "") -> Tree:
    """Snapshots of one letter, a minute between them; "ba" is b, which comes from a."""
    found = [
        manifest(edge[0], edge[1:] or None).model_copy(
            update={
                "created_at": NOW + timedelta(minutes=number),
                "deleting": edge[0] in deleting,
            }
        )
        for number, edge in enumerate(edges)
    ]
    return {m.name: m for m in found}


LINE = tree("a", "ba", "cb", "dc", "ed")


@pytest.mark.parametrize(
    ("snapshots", "current", "request_", "gone"),
    [
        (LINE, "e", PruneRequest(keep_last=2), "abc"),
        (LINE, "e", PruneRequest(keep_last=5), ""),
        (LINE, "b", PruneRequest(keep_last=1), "acd"),
        (LINE, None, PruneRequest(keep_last=1), "abcd"),
        (LINE, "e", PruneRequest(keep_last=1, keep_within_s=150), "ab"),
        (LINE, "e", PruneRequest(keep_last=3, keep_within_s=1), "ab"),
        (LINE, "e", PruneRequest(keep_last=1, keep_within_s=1e300), ""),
        # c cannot be restored any more: it does not count, and goes
        (tree("a", "ba", "cb", "dc", deleting="c"), "d", PruneRequest(keep_last=2), "ac"),
        # b holds what c and d need: c goes before it
        (tree("a", "ba", "cb", "db", "ed"), "e", PruneRequest(keep_last=2), "acb"),
        # so do b and the present state
        (tree("a", "ba", "ca", "dc"), "a", PruneRequest(keep_last=1), "bc"),
        (tree("a", "ba", "cb", "da"), "d", PruneRequest(keep_last=1), "bca"),
        # two branches stay: a is copied into both
        (tree("a", "ba", "ca"), "c", PruneRequest(keep_last=2), "a"),
        ({}, None, PruneRequest(keep_last=1), ""),
    ],
)
def test_examples(
    snapshots: Tree, current: str | None, request_: PruneRequest, gone: str
) -> None:
    now = NOW + timedelta(minutes=4)
    assert "".join(choose(snapshots, current, request_, now)) == gone


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any snapshots, with any parents, even such as there are not; circles too."""
    names = [f"s{number}" for number in range(draw(st.integers(0, 12)))]
    return {
        name: manifest(name, draw(st.none() | st.sampled_from([*names, "gone"]))).model_copy(
            update={
                "created_at": NOW - timedelta(minutes=draw(st.integers(-1, 30))),
                "deleting": draw(st.integers(0, 5)) == 0,
            }
        )
        for name in names
    }


REQUESTS = st.builds(
    PruneRequest,
    keep_last=st.integers(1, 6),
    keep_within_s=st.none() | st.floats(1, 3600),
)


@given(snapshots=trees(), request_=REQUESTS, data=st.data())
def test_whatever_the_tree(snapshots: Tree, request_: PruneRequest, data: st.DataObject) -> None:
    current = data.draw(st.none() | st.sampled_from([*snapshots])) if snapshots else None
    order = choose(snapshots, current, request_, NOW)
    stay = kept(snapshots, current, request_, NOW)
    assert len(order) == len(set(order))
    assert set(order) == snapshots.keys() - stay
    assert current not in order
    whole = [name for name, m in snapshots.items() if not m.deleting]
    assert len(stay & set(whole)) >= min(request_.keep_last, len(whole))
    gone = [m for m in snapshots.values() if m.name in order and not m.deleting]
    for name in stay - {current}:
        assert all(m.created_at <= snapshots[name].created_at for m in gone)
    if request_.keep_within_s is not None:
        edge = NOW - timedelta(seconds=request_.keep_within_s)
        assert all(m.created_at < edge for m in gone)


@given(snapshots=trees(), request_=REQUESTS)
def test_once_is_enough(snapshots: Tree, request_: PruneRequest) -> None:
    left = dict(snapshots)
    for name in choose(snapshots, None, request_, NOW):
        left = without(left, name)
    assert choose(left, None, request_, NOW) == ()


@given(snapshots=trees(), request_=REQUESTS)
def test_the_oldest_goes_first_but_for_what_is_waited_for(
    snapshots: Tree, request_: PruneRequest
) -> None:
    left = dict(snapshots)
    order = choose(snapshots, None, request_, NOW)
    for number, name in enumerate(order):
        upward = list(parents(left).values())
        for later in order[number + 1 :]:
            is_older = (left[later].created_at, later) < (left[name].created_at, name)
            assert not is_older or upward.count(later) > 1
        assert upward.count(name) < 2 or all(upward.count(n) > 1 for n in order[number:])
        left = without(left, name)


def without(snapshots: Tree, gone: str) -> dict[str, Manifest]:
    """What is left of them when one is deleted."""
    upward = parents(snapshots)
    return {
        name: m.model_copy(update={"parent": upward[gone]}) if upward[name] == gone else m
        for name, m in snapshots.items()
        if name != gone
    }
