"""Which snapshots a list shows; what is expected here is what virsh 9.0 shows of the same tree."""

import click
import pytest

from qsnapd.cli import listing

FLAGS = (
    *("tree", "name", "parent", "roots", "topological", "from", "current", "descendants"),
    *("leaves", "no-leaves", "metadata", "no-metadata"),
    *("inactive", "active", "disk-only", "internal", "external"),
)


def given(line: str) -> dict[str, bool]:
    words = line.split()
    assert set(words) <= set(FLAGS)
    return {flag: flag in words for flag in FLAGS}


def snapshot(name: str, parent: str | None, children: int, *, disks_only: bool = False) -> dict[
    str, object
]:
    return {
        "name": name,
        "parent": parent,
        "children": children,
        "strategy": None if disks_only else "stopped",
        "state": "running",
        "deleting": False,
    }


TREE = [
    snapshot("f", "a", 0, disks_only=True),
    snapshot("a", None, 2),
    snapshot("b", "a", 2),
    snapshot("c", "b", 0),
    snapshot("B2", "b", 1, disks_only=True),
    snapshot("e", "B2", 0),
]


@pytest.mark.parametrize(
    ("line", "start", "expected"),
    [
        ("", None, "a b B2 c e f"),
        ("roots", None, "a"),
        ("leaves", None, "c e f"),
        ("no-leaves", None, "a b B2"),
        ("leaves no-leaves", None, "a b B2 c e f"),
        ("metadata", None, "a b B2 c e f"),
        ("no-metadata", None, ""),
        ("metadata no-metadata", None, "a b B2 c e f"),
        ("inactive", None, ""),
        ("active", None, "a b c e"),
        ("disk-only", None, "B2 f"),
        ("disk-only active", None, "a b B2 c e f"),
        ("disk-only leaves", None, "f"),
        ("internal", None, ""),
        ("external", None, "a b B2 c e f"),
        ("internal external", None, "a b B2 c e f"),
        ("from", "b", "B2 c"),
        ("from descendants", "b", "B2 c e"),
        ("from descendants leaves", "b", "c e"),
        ("from tree", "b", "b B2 c e"),
        ("from", "e", ""),
        ("from roots", "a", ""),
        ("topological", None, "a b B2 c e f"),
    ],
)
def test_what_is_listed(line: str, start: str | None, expected: str) -> None:
    names = [snapshot["name"] for snapshot in listing.listed(TREE, given(line), start)]
    assert names == expected.split()


def test_topological_order_puts_parents_first() -> None:
    upside_down = [snapshot("a", "b", 0), snapshot("b", "z", 1), snapshot("z", None, 1)]
    names = [s["name"] for s in listing.listed(upside_down, given("topological"))]
    assert names == ["z", "b", "a"]
    assert [s["name"] for s in listing.listed(upside_down, given(""))] == ["a", "b", "z"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tree name", "Options --tree and --name are mutually exclusive"),
        ("parent roots", "Options --parent and --roots are mutually exclusive"),
        ("parent tree", "Options --parent and --tree are mutually exclusive"),
        ("roots tree", "Options --roots and --tree are mutually exclusive"),
        ("roots from", "Options --roots and --from are mutually exclusive"),
        ("roots current", "Options --roots and --current are mutually exclusive"),
        ("from current", "--from and --current are mutually exclusive"),
        ("descendants", "--descendants requires either --from or --current"),
        ("descendants tree", "--descendants requires either --from or --current"),
        *(
            (f"{flag} tree", f"--{flag} and --tree are mutually exclusive")
            for flag in listing.NOT_IN_A_TREE
        ),
    ],
)
def test_what_makes_no_sense(line: str, words: str) -> None:
    with pytest.raises(click.UsageError, match=f"^{words}$"):
        listing.require_sense(given(line))


@pytest.mark.parametrize(
    "line",
    ["tree metadata no-metadata topological from descendants", "name parent", "roots name leaves"],
)
def test_what_goes_together(line: str) -> None:
    listing.require_sense(given(line))


def test_a_circle_and_a_lost_parent_are_cut() -> None:
    broken = [snapshot("a", "c", 1), snapshot("b", "a", 1), snapshot("c", "b", 1)]
    broken.append(snapshot("d", "gone", 0))
    parents = listing.parents_within(broken)
    assert parents == {"a": "c", "b": "a", "c": None, "d": None}
    assert len(listing.listed(broken, given("topological"))) == 4


def test_states() -> None:
    assert listing.state_of(TREE[0]) == "disk-snapshot"
    assert listing.state_of(TREE[1]) == "running"
    assert listing.state_of(TREE[0] | {"deleting": True}) == "deleting"
