"""The interface text: stored as generated, and readable by others."""

from pathlib import Path

import varlink
from varlink.scanner import Interface

import qsnapd.control
from qsnapd import errors
from qsnapd.control import interface
from qsnapd.control.methods import METHODS
from qsnapd.model.snapshot import Manifest

STORED = Path(qsnapd.control.__file__).with_name("io.qsnapd.varlink")


def test_the_stored_text_is_the_generated_one() -> None:
    assert interface.text() == interface.generate(), (
        "the model changed: look whether clients can live with it, then write "
        f"qsnapd.control.interface.generate() to {STORED.name}, for example with `python -c "
        "'from qsnapd.control import interface; print(interface.generate(), end=\"\")'`"
    )


def test_another_parser_finds_every_method_and_error() -> None:
    members = Interface(interface.generate()).members
    assert set(METHODS) <= set(members)
    assert {error.__name__ for error in interface.error_classes()} <= set(members)
    assert "StoreFull" in members
    assert {*Manifest.model_fields, "current"} <= set(members["Snapshot"].type.fields)


def test_both_texts_are_served() -> None:
    for name in (interface.NAME, interface.SERVICE):
        text = interface.text(name)
        assert text is not None
        assert Interface(text).name == name
    assert interface.text("../../errors") is None


def test_nullable_is_what_may_be_left_out_or_null() -> None:
    text = interface.generate()
    assert "  live: ?bool,\n" in text, "a default in a request"
    assert "  description: string,\n" in text, "a default in a reply"
    assert "  sha256: ?string,\n" in text
    assert "  environment: [][]string\n" in text


def test_every_error_class_is_reachable_from_the_tree() -> None:
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert set(interface.error_classes()) == set(classes)
    assert varlink.Client is not None
