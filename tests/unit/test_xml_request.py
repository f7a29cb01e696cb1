"""What people and scripts ask for in XML, and what they try to smuggle in."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.errors import BadRequest
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.xml.reading import DEPTH_LIMIT, LIMIT_BYTES
from qsnapd.xml.request import read_request
from qsnapd.xml.schema import validate
from qsnapd.xml.snapshot import read_snapshot
from tests.parts import libvirt_schema

FULL = b"""<?xml version='1.0' encoding='UTF-8'?>
<!-- a comment -->
<domainsnapshot>
  <name>before-upgrade</name>
  <description> \xc3\xa4 &lt;b&gt;
second line</description>
  <memory snapshot='external' file='/m/mem'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/d/o.qcow2'/>
    </disk>
    <disk name='/d/b.img' snapshot='no'/>
    <disk name='vdc' snapshot='manual'/>
    <disk name='vdd' type='block'>
      <source dev='/dev/vg/lv'/>
    </disk>
    <disk name='vde'><source/></disk>
  </disks>
  <state>running</state>
  <creationTime>5</creationTime>
  <parent><name>x</name></parent>
  <domain type='kvm'><name>x</name><what><ever/></what></domain>
</domainsnapshot>
"""


def wrapped(inside: str) -> bytes:
    return f"<domainsnapshot>\n{inside}\n</domainsnapshot>".encode()


def test_everything_at_once() -> None:
    assert read_request(FULL) == CreateRequest(
        name="before-upgrade",
        description=" ä <b>\nsecond line",
        memory_file="/m/mem",
        disks=(
            DiskRequest(target="vda", file="/d/o.qcow2"),
            DiskRequest(target="/d/b.img", snapshot="no"),
            DiskRequest(target="vdc", snapshot="manual"),
            DiskRequest(target="vdd", file="/dev/vg/lv", target_type="block"),
            DiskRequest(target="vde"),
        ),
    )


def test_nothing_at_all() -> None:
    assert read_request(b"<domainsnapshot/>") == CreateRequest()


def test_memory_left_out_is_a_disk_only_snapshot() -> None:
    assert read_request(wrapped("<memory snapshot='no'/>")) == CreateRequest(disk_only=True)


@pytest.mark.parametrize(
    ("inside", "error"),
    [
        ("<name>a/b</name>", "name: invalid name 'a/b': it must not contain '/'"),
        ("<name/>", "name: a name must not be empty"),
        ("<name>a</name><name>b</name>", "line 2: <domainsnapshot> has a second <name>"),
        ("<naem>a</naem>", "line 2: unknown element <naem> in <domainsnapshot>"),
        ("<name kind='x'>a</name>", "line 2: unknown attribute 'kind' of <name>"),
        ("<name><b>a</b></name>", "line 2: <name> holds an element"),
        ("stray", "line 1: <domainsnapshot> holds text: 'stray'"),
        ("<memory file='/m' size='3'/>", "unknown attribute 'size' of <memory>"),
        ("<memory file='/m'><x/></memory>", "unknown element <x> in <memory>"),
        ("<memory snapshot='internal'/>", "line 2: internal snapshots are not made"),
        ("<disks><disc name='vda'/></disks>", "unknown element <disc> in <disks>"),
        ("<disks all='yes'/>", "unknown attribute 'all' of <disks>"),
        ("\n<disks>\n<disk/>\n</disks>", "line 4: missing name from disk snapshot element"),
        (
            "<disks><disk name='vda'/><disk name='vda'/></disks>",
            "line 2: disk 'vda' specified twice",
        ),
        (
            "<disks><disk name='vda' type='volume'><source pool='p' volume='v'/></disk></disks>",
            "unsupported disk snapshot type: 'volume'",
        ),
        ("<disks><disk name='vda' type='dir'/></disks>", "unsupported disk snapshot type: 'dir'"),
        (
            "<disks><disk name='vda' type='network'>"
            "<source protocol='nbd' name='x'><host name='h'/></source></disk></disks>",
            "unsupported disk snapshot type: 'network'",
        ),
        (
            "<disks><disk name='vda' type='block'><source file='/x'/></disk></disks>",
            "unknown attribute 'file' of <source>",
        ),
        (
            "<disks><disk name='vda'><source file='/x'><seclabel/></source></disk></disks>",
            "<seclabel> of an overlay is not supported",
        ),
        (
            "<disks><disk name='vda'><driver type='qcow2'>"
            "<metadata_cache><max_size>1</max_size></metadata_cache></driver></disk></disks>",
            "<metadata_cache> of an overlay is not supported",
        ),
        (
            "<disks><disk name='vda'><driver type='qed'/></disk></disks>",
            "external snapshot format for disk vda is unsupported: qed",
        ),
        ("<description>" + "x" * 5000 + "</description>", "description: String should have"),
    ],
)
def test_what_cannot_be(inside: str, error: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_request(wrapped(inside))
    assert error in str(refused.value)


BILLION_LAUGHS = (
    '<!DOCTYPE d [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    + "]><domainsnapshot>%s</domainsnapshot>"
)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (BILLION_LAUGHS % "<name>&a11;</name>", "document type|cannot be parsed"),
        (BILLION_LAUGHS % "<memory file='&a11;'/>", "document type|cannot be parsed"),
        (BILLION_LAUGHS % "", "document type"),
        (
            '<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
            "<domainsnapshot><name>&x;</name></domainsnapshot>",
            "document type",
        ),
        (
            '<!DOCTYPE d [<!ENTITY % x SYSTEM "http://127.0.0.1:1/x">%x;]><domainsnapshot/>',
            "document type",
        ),
        ('<!DOCTYPE d SYSTEM "http://127.0.0.1:1/x.dtd"><domainsnapshot/>', "document type"),
        ("<!DOCTYPE domainsnapshot><domainsnapshot/>", "document type"),
        (
            "<domainsnapshot xmlns:xi='http://www.w3.org/2001/XInclude'>"
            "<xi:include href='/etc/passwd' parse='text'/></domainsnapshot>",
            "unknown element",
        ),
        ("<domain/>", "unexpected root element <domain>, expecting <domainsnapshot>"),
        ("<domainsnapshot xmlns='urn:x'/>", "unexpected root element"),
        ("<domainsnapshot>", "cannot be parsed"),
        ("", "cannot be parsed"),
        ("<domainsnapshot>&nbsp;</domainsnapshot>", "cannot be parsed"),
        ("<domainsnapshot>\0</domainsnapshot>", "cannot be parsed"),
        ("\udcff", "not UTF-8"),
        (
            f"<domainsnapshot>{'<domain>' * DEPTH_LIMIT}{'</domain>' * DEPTH_LIMIT}"
            "</domainsnapshot>",
            "nested more than",
        ),
        (f"<domainsnapshot>{'<a>' * 100_000}", "cannot be parsed"),
        (f"<domainsnapshot><name>{'x' * LIMIT_BYTES}</name></domainsnapshot>", "longer than"),
    ],
)
def test_hostile_xml(data: str, error: str) -> None:
    started = time.monotonic()
    with pytest.raises(BadRequest, match=error):
        read_request(data.encode("utf-8", "surrogateescape"))
    assert time.monotonic() - started < 5


pieces = st.sampled_from(
    [
        *("<domainsnapshot>", "</domainsnapshot>", "<disks>", "</disks>", "<disk name='vda'/>"),
        *("<disk name='vdb'>", "</disk>", "<memory file='/m'/>", "<name>", "</name>", "a/b"),
        *("<source file='/x'/>", "<driver type='qcow2'/>", "<!-- -->", "<?x?>", "<![CDATA[<]]>"),
        *("&#0;", "&#x1;", "]]>", "<x:y xmlns:x='urn:x'/>", "\n", "\u00e4", "<domain>", "&lt;"),
    ]
)


@given(st.binary() | st.lists(pieces).map(lambda words: "".join(words).encode()))
def test_whatever_comes_is_a_request_or_refused(data: bytes) -> None:
    for read in (read_request, read_snapshot):
        with suppress(BadRequest):
            read(data)
    with suppress(BadRequest):
        read_request(b"<domainsnapshot>" + data + b"</domainsnapshot>")


def test_an_encoding_is_only_a_claim() -> None:
    data = b"<?xml version='1.0' encoding='utf-16'?><domainsnapshot><name>a</name></domainsnapshot>"
    assert read_request(data).name == "a"


def test_the_schema_of_libvirt() -> None:
    assert validate(wrapped("<memory file='/m'/>"), libvirt_schema())
    with pytest.raises(BadRequest, match="does not fit libvirt's schema"):
        validate(wrapped("<memory snapshot='external'/>"), libvirt_schema())
    with pytest.raises(BadRequest, match="document type"):
        validate(b"<!DOCTYPE d><domainsnapshot/>", libvirt_schema())


def test_no_schema_is_no_error() -> None:
    assert not validate(wrapped(""), libvirt_schema().with_name("missing.rng"))


def test_many_disks_take_time_in_proportion() -> None:
    disks = "".join(f"<disk name='d{number}'/>" for number in range(60_000))
    began_s = time.process_time()
    assert len(read_request(wrapped(f"<disks>{disks}</disks>")).disks) == 60_000
    assert time.process_time() - began_s < 10  # it was minutes
