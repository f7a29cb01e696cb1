"""Names of VMs and snapshots: safe as one component of a path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.model.names import NAME_LIMIT_BYTES, check_name


@pytest.mark.parametrize("name", ["a", "vm 1", "20260101T000000Z", "Größe", "a.b", "a-", "x" * 128])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must not be empty"),
        ("a/b", "must not contain '/'"),
        ("..", "must not start with '.'"),
        (".hidden", "must not start with '.'"),
        ("-rf", "must not start with '-'"),
        (" a", "surrounding blanks"),
        ("a\n", "control characters"),
        ("a\0b", "control characters"),
        ("\u202ea", "control characters"),
        ("x" * 129, "longer than 128 bytes"),
        ("é" * 65, "longer than 128 bytes"),
        ("\udcff", "control characters"),
    ],
)
def test_bad_names(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_name(name)


@given(st.text(max_size=200))
def test_what_is_let_through_is_one_short_component(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert len(name.encode()) <= NAME_LIMIT_BYTES
