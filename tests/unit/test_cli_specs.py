"""memspec and diskspec, as virsh reads them."""

import click
import pytest

from qsnapd.cli.specs import DiskSpec, MemSpec, request_xml
from qsnapd.errors import BadRequest
from qsnapd.xml.request import read_request


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("/m.img", "/m.img"),
        ("file=/m.img,snapshot=external", "/m.img"),
        ("snapshot=external,file=/m.img", "/m.img"),
        ("snapshot=external,/m.img", "/m.img"),
        ("/a,,b=c.img", "/a,b=c.img"),
    ],
)
def test_memspecs(spec: str, file: str) -> None:
    assert MemSpec.parse(spec).request() == {"memory_file": file, "disk_only": False}


def test_a_memspec_can_leave_the_memory_out() -> None:
    wanted = {"memory_file": None, "disk_only": True}
    assert MemSpec.parse("snapshot=no").request() == wanted


def test_diskspecs() -> None:
    plain = {"target": "vda", "snapshot": "external", "file": None, "target_type": "file"}
    assert DiskSpec.parse("vda").request() == plain
    assert DiskSpec.parse("vda,snapshot=no").request() == plain | {"snapshot": "no"}
    assert DiskSpec.parse("vda,snapshot=manual").request() == plain | {"snapshot": "manual"}
    assert DiskSpec.parse("vda,file=/x/a,,b.qcow2").request() == plain | {"file": "/x/a,b.qcow2"}
    assert DiskSpec.parse("/d.img").request() == plain | {"target": "/d.img"}
    assert DiskSpec.parse("vda,driver=qcow2,stype=block,file=/dev/x").request() == plain | {
        "file": "/dev/x",
        "target_type": "block",
    }


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("vda,x=1", "unable to parse diskspec: vda,x=1"),
        ("vda,file", "unable to parse diskspec"),
        ("vda,file=/a,file=/b", "unable to parse diskspec"),
        ("vda,stype=network", "Unknown storage type: 'network'"),
    ],
)
def test_what_is_no_diskspec(spec: str, error: str) -> None:
    with pytest.raises(click.UsageError, match=error):
        DiskSpec.parse(spec)


@pytest.mark.parametrize("spec", ["", "m.img", "/m,x=1", "/m,file=/n", "file=/m,snapshot"])
def test_what_is_no_memspec(spec: str) -> None:
    with pytest.raises(click.UsageError, match="unable to parse memspec"):
        MemSpec.parse(spec)


MEMORY_ERRORS = [
    ("file=", "external memory snapshots require a filename"),
    ("snapshot=external", "external memory snapshots require a filename"),
    ("/m,snapshot=no", "memory filename '/m' requires external snapshot"),
    ("file=m.img", r"memory snapshot file path \(m.img\) must be absolute"),
    ("snapshot=manual", "'manual' memory snapshot mode not supported"),
    ("snapshot=internal", "external only, by design"),
    ("snapshot=bogus", "Invalid value for attribute 'snapshot' in element 'memory': 'bogus'"),
]
DISK_ERRORS = [
    ("", "missing name from disk snapshot element"),
    (",file=/a", "missing name from disk snapshot element"),
    ("vda,snapshot=internal", "external only, by design"),
    ("vda,snapshot=bogus", "Invalid value for attribute 'snapshot' in element 'disk': 'bogus'"),
    ("vda,file=o.qcow2", "disk snapshot image path 'o.qcow2' must be absolute"),
    ("vda,driver=qed", "external snapshot format for disk vda is unsupported: qed"),
    ("vda,file=/o,snapshot=no", "file '/o' for disk 'vda' requires use of external snapshot mode"),
    ("vda,file=/o,snapshot=manual", "requires use of external snapshot mode"),
]


@pytest.mark.parametrize(("spec", "error"), MEMORY_ERRORS)
def test_what_a_memspec_cannot_ask_for(spec: str, error: str) -> None:
    with pytest.raises(BadRequest, match=error):
        MemSpec.parse(spec).request()


@pytest.mark.parametrize(("spec", "error"), DISK_ERRORS)
def test_what_a_diskspec_cannot_ask_for(spec: str, error: str) -> None:
    with pytest.raises(BadRequest, match=error):
        DiskSpec.parse(spec).request()


@pytest.mark.parametrize(
    ("memory", "disk", "error"),
    [(m, "vda", error) for m, error in MEMORY_ERRORS]
    + [("/m", d, error) for d, error in DISK_ERRORS],
)
def test_the_xml_of_it_is_refused_in_the_same_words(memory: str, disk: str, error: str) -> None:
    xml = request_xml("s1", None, MemSpec.parse(memory), [DiskSpec.parse(disk)])
    with pytest.raises(BadRequest, match=error):
        read_request(xml.encode())


def test_the_xml_is_what_virsh_writes() -> None:
    memory = MemSpec.parse("/m,,x,snapshot=external")
    disks = [
        DiskSpec.parse("vda,file=/x,,y'&<,driver=qcow2,stype=block"),
        DiskSpec.parse("vdb,snapshot=no"),
    ]
    assert request_xml("a", "b & <c>", memory, disks) == (
        "<domainsnapshot>\n"
        "  <name>a</name>\n"
        "  <description>b &amp; &lt;c&gt;</description>\n"
        "  <memory snapshot='external' file='/m,x'/>\n"
        "  <disks>\n"
        "    <disk name='vda' type='block'>\n"
        "      <driver type='qcow2'/>\n"
        "      <source dev='/x,y&apos;&amp;&lt;'/>\n"
        "    </disk>\n"
        "    <disk name='vdb' snapshot='no'/>\n"
        "  </disks>\n"
        "</domainsnapshot>\n"
    )
    assert request_xml(None, None, None, []) == "<domainsnapshot>\n</domainsnapshot>\n"
