"""snapshot-create and snapshot-create-as, as people run them."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.xml.snapshot import write_snapshot
from tests.unit.control_host import Served, manifest
from tests.unit.test_cli import QSNAPCTL, environment, run

XML = """<domainsnapshot>
  <name>s9</name>
  <description>words</description>
  <memory file='/m'/>
  <disks><disk name='vda'><source file='/x'/></disk><disk name='vdb' snapshot='manual'/></disks>
</domainsnapshot>
"""
DISK_ONLY = {"memory": None, "strategy": None, "image_format": None}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot.xml"
    path.write_text(XML)
    return path


async def test_without_a_file_everything_is_by_default(served: Served) -> None:
    assert await run(served, "snapshot-create vm1") == "Domain snapshot auto created\n"
    assert served.host.requests == [CreateRequest()]


async def test_what_the_xml_says(served: Served, xml: Path) -> None:
    said = await run(served, f"snapshot-create vm1 {xml}")
    assert said == f"Domain snapshot s9 created from '{xml}'\n"
    disks = (DiskRequest(target="vda", file="/x"), DiskRequest(target="vdb", snapshot="manual"))
    assert served.host.requests == [
        CreateRequest(name="s9", description="words", memory_file="/m", disks=disks)
    ]


@pytest.mark.parametrize("verb", ["snapshot-create", "snapshot-create-as"])
async def test_every_flag_arrives(served: Served, verb: str) -> None:
    line = (
        f"{verb} --domain vm1 --no-metadata --halt --disk-only --reuse-external --quiesce "
        "--atomic --live --hold-limit 2.5"
    )
    await run(served, line)
    assert served.host.requests == [
        CreateRequest(
            keep_metadata=False,
            halt=True,
            disk_only=True,
            reuse_overlays=True,
            quiesce=True,
            live=True,
            hold_limit_s=2.5,
        )
    ]


async def test_memory_can_be_left_out_by_its_spec(served: Served, xml: Path) -> None:
    await run(served, "snapshot-create-as vm1 s9 --memspec snapshot=no")
    await trio.Path(xml).write_text(
        "<domainsnapshot><name>s8</name><memory snapshot='no'/></domainsnapshot>"
    )
    await run(served, f"snapshot-create vm1 {xml}")
    assert served.host.requests == [
        CreateRequest(name="s9", disk_only=True),
        CreateRequest(name="s8", disk_only=True),
    ]


async def test_diskspecs(served: Served) -> None:
    line = (
        "snapshot-create-as vm1 s9 words vda,stype=block,driver=qcow2,file=/dev/x "
        "vdb,snapshot=manual --diskspec vdc,snapshot=no"
    )
    await run(served, line)
    assert served.host.requests[0] == CreateRequest(
        name="s9",
        description="words",
        disks=(
            DiskRequest(target="vdc", snapshot="no"),
            DiskRequest(target="vda", file="/dev/x", target_type="block"),
            DiskRequest(target="vdb", snapshot="manual"),
        ),
    )


async def test_print_xml_prints_and_does_nothing(served: Served) -> None:
    line = "snapshot-create-as vm1 s1 --print-xml --quiesce --diskspec vda,snapshot=internal"
    assert await run(served, line) == (
        "<domainsnapshot>\n  <name>s1</name>\n  <disks>\n"
        "    <disk name='vda' snapshot='internal'/>\n  </disks>\n</domainsnapshot>\n"
    )
    assert served.host.requests == []


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("snapshot-create vm1 --current", 1, "--current requires --redefine"),
        ("snapshot-create vm1 /nowhere.xml", 1, "Failed to open file '/nowhere.xml': No such file"),
        ("snapshot-create vm1 --redefine", 1, "a redefined snapshot must have a name"),
        ("snapshot-create vm1 {good} --redefine --halt", 1, "--redefine and --halt are mutually"),
        ("snapshot-create vm1 {good} --redefine --no-metadata", 1, "mutually exclusive"),
        ("snapshot-create vm1 {good} --redefine --live", 1, "mutually exclusive"),
        ("snapshot-create vm1 {good} --redefine --quiesce", 1, "--quiesce requires --disk-only"),
        (
            "snapshot-create vm1 {good} --redefine --disk-only",
            1,
            "disk-only flag for snapshot s1 requires disk-snapshot state",
        ),
        ("snapshot-create vm1 {bad}", 1, "line 1: unknown element <disk> in <domainsnapshot>"),
        ("snapshot-create-as vm1 s9 --diskspec vda,foo", 1, "unable to parse diskspec: vda,foo"),
        ("snapshot-create-as vm1 s9 --memspec m", 1, "unable to parse memspec: m"),
        (
            "snapshot-create-as vm1 s9 --diskspec vda,snapshot=internal",
            1,
            "external only, by design",
        ),
        (
            "snapshot-create-as vm1 s9 --diskspec vda --diskspec vda",
            1,
            "disk 'vda' specified twice",
        ),
        ("snapshot-create-as vm1 s9 --diskspec vda,driver=qed", 1, "is unsupported: qed"),
        ("snapshot-create-as vm1 s9 --hold-limit 0", 1, "--hold-limit"),
    ],
)
async def test_refusals(
    served: Served, tmp_path: Path, line: str, status: int, error: str
) -> None:
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    good.write_text(write_snapshot(manifest("s1")))
    bad.write_text("<domainsnapshot><disk/></domainsnapshot>")
    assert error in await run(served, line.format(good=good, bad=bad), status)
    assert served.host.requests == []


async def test_redefine(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "s7.xml"
    brought = manifest("s7", "s1").model_copy(update={"description": "ä"} | DISK_ONLY)
    path.write_text(write_snapshot(brought))
    line = f"snapshot-create vm1 {path} --redefine --current --disk-only --quiesce --atomic"
    assert await run(served, line) == f"Domain snapshot s7 created from '{path}'\n"
    assert served.host.manifests["s7"] == brought
    assert served.host.current_name == "s7"
    assert served.host.requests == []
    told = json.loads(await run(served, f"--json snapshot-create vm1 {path} --redefine"))
    known = {name: told[name] for name in Manifest.model_fields}
    assert Manifest.model_validate(known) == brought


async def test_validate_where_there_is_no_schema(served: Served) -> None:
    # libvirt need not be there; what it would say is tested with its schema, without it is this
    done = await run_loud(served, "snapshot-create-as vm1 s9 --validate")
    assert done in ("", "note: /usr/share/libvirt/schemas/domainsnapshot.rng is not installed: "
                        "not held against it\n")  # fmt: skip
    [request] = served.host.requests
    assert isinstance(request, CreateRequest)
    assert request.name == "s9"


async def run_loud(served: Served, line: str) -> str:
    """Run `qsnapctl LINE`, which works, and return what it printed on stderr."""
    done = await trio.run_process(
        [QSNAPCTL, *line.split()], env=environment(served), capture_stderr=True, capture_stdout=True
    )
    return done.stderr.decode()
