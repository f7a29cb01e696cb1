"""Snapshots as XML: nothing is lost, libvirt's schema is met, edits count and lies do not."""

import json
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from qsnapd.errors import BadRequest, ManifestInvalid, ManifestTooNew, QsnapError
from qsnapd.model.names import check_name
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.xml.schema import validate
from qsnapd.xml.snapshot import read_snapshot, write_snapshot
from qsnapd.xml.xpath import select
from tests.parts import libvirt_schema
from tests.unit.control_host import manifest

SCHEMA = etree.RelaxNG(file=str(libvirt_schema()))
UUID = "6b3f1c1e-7b61-4a5e-9d5b-0d2a0f5f2a11"


def is_name(text: str) -> bool:
    try:
        check_name(text)
    except ValueError:
        return False
    return True


names = st.text(min_size=1, max_size=30).filter(is_name)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).map(
    lambda text: f"/{text}"
)
plain_paths = st.text(string.ascii_letters + string.digits + "._-,'&<>\" ä/", min_size=1).map(
    lambda text: f"/{text}"
)


def disks(paths: st.SearchStrategy[str]) -> st.SearchStrategy[DiskLayer]:
    return st.builds(
        DiskLayer,
        target=st.sampled_from(["vda", "sdab", "nvme0n1", "hda", "virtio0", "floppy0"]),
        node=words,
        qdev=st.none() | words,
        frozen=paths,
        frozen_format=st.sampled_from(["qcow2", "raw", "luks", "odd"]),
        overlay=st.none() | paths | st.just("/dev/vg/lv"),
        virtual_size_bytes=st.integers(0, 1 << 50),
        chain=st.lists(
            st.builds(
                FileIdentity,
                path=paths,
                device=st.integers(0, 1 << 60),
                inode=st.integers(0, 1 << 60),
            ),
            max_size=3,
        ).map(tuple),
    )


def manifests(paths: st.SearchStrategy[str]) -> st.SearchStrategy[Manifest]:
    whole = manifest("s1")
    argv = st.lists(paths, min_size=1, max_size=5).map(tuple)

    def build(**more: Any) -> Manifest:  # noqa: ANN401
        process = whole.machine.process.model_copy(
            update={"argv": more.pop("argv"), "exe": more.pop("exe")}
        )
        update = {"process": process, "uuid": more.pop("uuid"), "type": more.pop("type")}
        machine = whole.machine.model_copy(update=update)
        if more.pop("disk_only"):
            more |= {"memory": None, "strategy": None, "image_format": None}
        manual = tuple(disk.target for disk in more["left_out"][:1])
        more |= {"machine": machine, "manual_disks": manual}
        return whole.model_copy(update=more)

    return st.builds(
        build,
        name=names,
        vm=names,
        parent=st.none() | names,
        description=words,
        labels=st.dictionaries(words, words, max_size=3),
        created_at=st.datetimes(
            datetime(1970, 1, 2), datetime(3000, 1, 1), timezones=st.just(UTC)
        ),
        state=st.sampled_from(["running", "paused"]),
        argv=argv,
        exe=st.sampled_from(["/usr/bin/qemu-system-x86_64", "/q/qemu-system-i386", "/q/emu"]),
        uuid=st.sampled_from([None, UUID, "odd"]),
        type=st.sampled_from(["pc-q35-10.0", "microvm", "odd one"]),
        disk_only=st.booleans(),
        disks=st.lists(disks(paths), max_size=3).map(tuple),
        left_out=st.lists(disks(paths), max_size=2).map(tuple),
    )


@given(manifests(paths))
def test_nothing_is_lost(original: Manifest) -> None:
    assert read_snapshot(write_snapshot(original).encode()) == original


@given(manifests(plain_paths))
def test_libvirt_would_take_it(original: Manifest) -> None:
    root = etree.fromstring(write_snapshot(original).encode())
    assert SCHEMA.validate(root), SCHEMA.error_log


def test_what_libvirts_tools_find_in_it() -> None:
    original = manifest("s1", "s0")
    xml = write_snapshot(original)
    assert validate(xml.encode(), libvirt_schema())
    for path, text in {
        "string(/domainsnapshot/name)": "s1",
        "string(/domainsnapshot/parent/name)": "s0",
        "string(/domainsnapshot/state)": "running",
        "string(/domainsnapshot/creationTime)": "1767322805",
        "string(/domainsnapshot/memory/@file)": "/s/memory.img",
        "string(//disks/disk[@name='vda']/source/@file)": "/d/base.after-s1.qcow2",
        "string(/domainsnapshot/domain/name)": "vm1",
        "string(//devices/disk[target/@dev='vda']/source/@file)": "/d/base.qcow2",
    }.items():
        assert select(xml, path) == [text]
    assert "\n  <memory snapshot='external' file='/s/memory.img'/>\n" in xml


def test_a_disk_only_snapshot() -> None:
    update = {"memory": None, "strategy": None, "image_format": None}
    xml = write_snapshot(manifest("s1").model_copy(update=update))
    assert select(xml, "string(//state)") == ["disk-snapshot"]
    assert select(xml, "//memory[@snapshot]") == ["<memory snapshot='no'/>"]


def edited(change: Callable[[str], str], original: Manifest | None = None) -> Manifest:
    return read_snapshot(change(write_snapshot(original or manifest("s1", "s0"))).encode())


def test_what_a_person_may_edit() -> None:
    def change(xml: str) -> str:
        xml = xml.replace("<name>s1</name>", "<name>s9</name>", 1)
        xml = xml.replace("<name>s0</name>", "<name>s8</name>", 1)
        xml = xml.replace("1767322805", "1767322806", 1)
        return xml.replace("<state>", "<description>new &amp; better</description><state>", 1)

    assert edited(change) == manifest("s1", "s0").model_copy(
        update={
            "name": "s9",
            "parent": "s8",
            "description": "new & better",
            "created_at": manifest("s1").created_at + timedelta(seconds=1),
        }
    )


def test_what_other_versions_may_add_or_leave_out() -> None:
    def change(xml: str) -> str:
        xml = xml.replace("<driver type='qcow2'/>", "<driver type='qcow2' cache='none'/>", 1)
        return xml.replace(" type='file'", "", 1)

    assert edited(change) == manifest("s1", "s0")


def test_a_parent_and_a_description_may_go() -> None:
    original = manifest("s1", "s0").model_copy(update={"description": "words"})

    def change(xml: str) -> str:
        start, end = xml.index("<parent>"), xml.index("<creationTime>")
        return (xml[:start] + xml[end:]).replace("<description>words</description>", "", 1)

    update = {"parent": None, "description": ""}
    assert edited(change, original) == original.model_copy(update=update)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("<state>running", "<state>disk-snapshot", "<state> contradicts the manifest"),
        ("file='/s/memory.img'", "file='/elsewhere'", "<memory> contradicts the manifest"),
        ("<disk name='vda' ", "<disk name='vdb' ", "<disks> contradicts the manifest"),
        ("file='/d/base.after-s1.qcow2'", "file='/x'", "<disks> contradicts the manifest"),
        ("snapshot='external' type", "snapshot='internal' type", "external only, by design"),
        ("<name>vm1</name>", "<name>vm2</name>", "<domain> has name 'vm2'"),
        ("<state>running</state>", "", "missing <state> in existing snapshot"),
        ("<name>s1</name>", "", "a redefined snapshot must have a name"),
        ("<name>s1</name>", "<name>a/b</name>", "name: invalid name 'a/b'"),
        ("1767322805", "soon", "creationTime 'soon' is no number of seconds"),
        ("1767322805", "9" * 30, "is no number of seconds"),
        ("<name>s0</name>", "", "<parent> has no <name>"),
        ("qsnapd:manifest", "qsnapd:other", "there is no manifest of qsnapd"),
        ('"paused_ms": 12.5', '"paused_ms": "long"', "field 'paused_ms'"),
        ('"deleting"', '"deleted"', "field 'deleted' is unknown"),
        ('"format": 3', '"format": 99', "a newer version wrote it"),
        ('"format": 3', '"format": ', "is not valid JSON"),
        ("<state>", "<surprise/><state>", "unknown element <surprise>"),
    ],
)
def test_contradictions(old: str, new: str, error: str) -> None:
    assert old in write_snapshot(manifest("s1", "s0"))
    with pytest.raises(QsnapError) as refused:
        edited(lambda xml: xml.replace(old, new))
    assert isinstance(refused.value, BadRequest | ManifestInvalid | ManifestTooNew)
    assert error in str(refused.value)


def test_xml_of_libvirt_itself_is_told_apart() -> None:
    xml = (
        "<domainsnapshot><name>a</name><state>running</state><creationTime>1</creationTime>"
        "<domain type='kvm'><name>vm1</name></domain></domainsnapshot>"
    )
    with pytest.raises(BadRequest, match="only snapshots that qsnapd has taken"):
        read_snapshot(xml.encode())


def test_two_manifests_are_one_too_many() -> None:
    def change(xml: str) -> str:
        start, end = xml.index("<qsnapd:manifest"), xml.index("</metadata>")
        return xml[:end] + xml[start:end] + xml[end:]

    with pytest.raises(BadRequest, match="there is no manifest"):
        edited(change)


def test_the_manifest_within_is_readable_json() -> None:
    text = select(write_snapshot(manifest("s1")), "string(//qsnapd:manifest)")[0]
    assert json.loads(text) == manifest("s1").model_dump(mode="json")


def test_xpath() -> None:
    xml = write_snapshot(manifest("s1"))
    assert select(xml, "//name") == ["<name>s1</name>", "<name>vm1</name>"]
    assert select(xml, "//name", wrapped=True) == [
        "<nodes>\n  <name>s1</name>\n  <name>vm1</name>\n</nodes>"
    ]
    assert select(xml, "/domainsnapshot/disks/disk/@type") == [' type="file"']
    assert select(xml, "//name/text()") == ["s1", "vm1"]
    assert select(xml, "//name/text()", wrapped=True) == ["<nodes>s1vm1</nodes>"]
    assert select(xml, "count(//name)") == ["2"]
    assert select(xml, "//nothing") == []
    with pytest.raises(BadRequest, match="Incorrect xpath"):
        select(xml, "//[")
