"""Reading and writing QEMU's command line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.vm.argv import Fields, NotUnderstood, Option, parse_options, words_of
from tests.fuzz.bounds import bounded

KEYS = st.from_regex(r"[a-z][a-z0-9-]{0,6}(\.[a-z][a-z0-9-]{0,6}){0,2}", fullmatch=True)
NAMES = st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True)
JSON_TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=10,
    ),
)


@given(st.dictionaries(KEYS, st.text()))
def test_fields_survive_writing_and_reading(values: dict[str, str]) -> None:
    assert Fields.parse(str(Fields(values))) == values


@given(JSON_TREES)
def test_json_survives_reading_and_writing(tree: dict[str, object]) -> None:
    assert json.loads(str(Fields.parse(json.dumps(tree)))) == tree


@given(st.lists(st.text(alphabet="a,=.", max_size=8), max_size=4))
def test_what_was_read_is_written_so_that_it_reads_the_same(parts: list[str]) -> None:
    once = Fields.parse(",".join(parts), first_key="driver")
    assert Fields.parse(str(once)) == once


@pytest.mark.parametrize(
    ("text", "first_key", "expected"),
    [
        ("", None, {}),
        ("qcow2,node-name=d0", "driver", {"driver": "qcow2", "node-name": "d0"}),
        ("file=/a,,b.img,if=none", None, {"file": "/a,b.img", "if": "none"}),
        ("file=/a,,,if=none", None, {"file": "/a,", "if": "none"}),
        ("file=/a=b,snapshot", None, {"file": "/a=b", "snapshot": "on"}),
        ("pc,accel=kvm", "type", {"type": "pc", "accel": "kvm"}),
        ('{"file": {"driver": "file"}}', None, {"file.driver": "file"}),
        ('{"c": [{"x": 1}, 2]}', None, {"c.0.x": 1, "c.1": 2}),
        ('{"backing": null, "e": {}}', None, {"backing": None, "e": {}}),
    ],
)
def test_fields(text: str, first_key: str | None, expected: dict[str, object]) -> None:
    assert Fields.parse(text, first_key=first_key) == expected


def test_dropping_takes_what_lies_below_too() -> None:
    fields = Fields.parse("backing=x,backing.file.filename=y,backing-too=z")
    fields.drop("backing")
    assert fields == {"backing-too": "z"}


def test_options_are_split_as_qemu_does() -> None:
    words = ("--nodefaults", "-m", "64", "disk.img", "-S", "--name", "-x")
    assert parse_options(words) == [
        Option("nodefaults"),
        Option("m", "64"),
        Option("", "disk.img"),
        Option("S"),
        Option("name", "-x"),
    ]


@given(st.lists(st.sampled_from(["-S", "--S", "-m", "--name", "64", "d.img", "-nodefaults"])))
def test_options_are_written_word_for_word(words: list[str]) -> None:
    assert words_of(parse_options(words)) == tuple(words)


@pytest.mark.parametrize(
    "text", ["{", '{"a": "x", "a.b": "y"}', "{" + '"a":{' * 3000, '{"a":' + "[" * 100000]
)
def test_json_that_cannot_be_read_is_refused_in_words(text: str) -> None:
    with pytest.raises(NotUnderstood, match=r"qsnapd cannot read this|says one thing twice"):
        Fields.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "{" + f'"{"." * 100_000}": 1' + "}",
        "." * 100_000 + "=1",
        "a." * 300 + "filename=/x,driver=file",
        '{"a":' * 300 + "1" + "}" * 300,
    ],
    ids=["dots in JSON", "dots", "a long way down", "JSON"],
)
def test_what_is_nested_too_deep_is_refused_at_once(text: str) -> None:
    with bounded(len(text)), pytest.raises(NotUnderstood, match="nested more than 255 deep"):
        Fields.parse(text)


def test_deep_chains_are_understood() -> None:
    text = '{"driver": "qcow2", "backing": ' * 200 + '"n"' + "}" * 200
    assert json.loads(str(Fields.parse(text))) == json.loads(text)


def test_a_number_too_long_for_an_index_is_a_key() -> None:
    text = json.dumps({"a": {"9" * 5000: 1}})
    assert str(Fields.parse(text)) == text


def test_one_thing_is_said_twice_whatever_lies_between() -> None:
    with pytest.raises(NotUnderstood, match="says one thing twice"):
        Fields.parse('{"a": 1, "a-b": 2, "a.b": 3}')
    assert Fields.parse('{"a-b": 2, "a.b": 3, "ab": 1}') == {"a-b": 2, "a.b": 3, "ab": 1}
