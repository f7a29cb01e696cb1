"""`qsnapctl snapshot-fsck`, and snapshots' descriptions without their data, as people run them."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsnapd.model.findings import Finding, Severity
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.transfer import Scanned, ScanOutcome, ScanResult
from tests.unit.control_host import Served
from tests.unit.test_cli import run
from tests.unit.test_cli_transfer import HERE, raw

LOST = Finding(
    code="image-missing", severity=Severity.ERROR, what="/d/a is missing", mend="bring it back"
)
LEFT = Finding(
    code="view-abandoned", severity=Severity.WARNING, what="/s/.view is left", mend="repair it"
)
ODD = Finding(code="stranger", severity=Severity.NOTE, what="/s/x is unknown", mend="move it")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_nothing_is_wrong(served: Served) -> None:
    assert await run(served, "snapshot-fsck vm1") == "Domain vm1 is in order\n"
    served.host.skipped = ("the disks: no QEMU",)
    assert await run(served, "snapshot-fsck vm1") == (
        "skipped: the disks: no QEMU\nDomain vm1 is in order as far as it was looked at\n"
    )


async def test_bad_news_are_an_exit_status(served: Served) -> None:
    served.host.findings = (LOST, LEFT, ODD)
    out, err = await raw(served, "snapshot-fsck vm1", status=1)
    assert (out.decode(), err) == (
        "error: image-missing: /d/a is missing\n    bring it back\n"
        "warning: view-abandoned: /s/.view is left\n    repair it\n"
        "note: stranger: /s/x is unknown\n    move it\n"
        "Domain vm1 is not in order: 1 error, 1 warning, 1 note\n",
        b"",
    )
    out, _ = await raw(served, "--json snapshot-fsck vm1", status=1)
    found = json.loads(out)
    assert (found["clean"], found["vm"], found["skipped"]) == (False, "vm1", [])
    assert [finding["code"] for finding in found["findings"]] == [
        "image-missing",
        "view-abandoned",
        "stranger",
    ]


async def test_notes_are_no_bad_news(served: Served) -> None:
    served.host.findings = (ODD, ODD)
    said = await run(served, "snapshot-fsck vm1")
    assert said.endswith("Domain vm1 is in order (2 notes)\n")


async def test_repaired(served: Served) -> None:
    served.host.findings = (LEFT,)
    assert await run(served, "snapshot-fsck vm1 --repair") == (
        "warning: view-abandoned: /s/.view is left\n    repaired\n"
        "Domain vm1 is in order (1 repaired)\n"
    )


async def test_metadata_goes_and_comes(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "s1.json"
    said = await run(served, f"snapshot-export vm1 s1 --metadata {file}")
    assert said == f"Metadata of domain snapshot s1 exported to {file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert parse_manifest(file.read_bytes(), "it") == served.host.manifests["s1"]
    assert await run(served, "snapshot-export vm1 s1 --metadata") == file.read_text()
    said = await run(served, f"snapshot-export vm1 s1 --metadata {file}", status=1)
    assert "File exists" in said
    before = served.host.manifests.pop("s1")
    out, err = await raw(served, f"snapshot-import vm1 --metadata {file}")
    assert (out, err) == (b"Domain snapshot s1 imported\n", b"note: a note\n")
    assert served.host.manifests["s1"] == before
    await raw(served, "snapshot-import vm1 --name n --metadata", stdin=file.read_bytes())
    assert served.host.manifests["n"] == before.model_copy(update={"name": "n"})


async def test_metadata_as_xml(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "s1.xml"
    await run(served, f"snapshot-export vm1 s1 --xml {file}")
    assert file.read_text().startswith("<domainsnapshot")
    before = served.host.manifests.pop("s1")
    await raw(served, f"snapshot-import vm1 --metadata {file}")
    assert served.host.manifests["s1"] == before


async def test_scan(served: Served) -> None:
    served.host.scan_result = ScanResult(
        found=(
            Scanned(path="/o/s1", name="s1", outcome=ScanOutcome.IMPORTED, notes=("a copy",)),
            Scanned(path="/o/s2", name="s2", outcome=ScanOutcome.PRESENT),
        ),
        current="s1",
    )
    assert await run(served, "snapshot-import vm1 --scan old") == (
        "imported  s1  /o/s1\n"
        "          note: a copy\n"
        "present   s2  /o/s2\n"
        "1 of 2 snapshots imported\n"
        "Snapshot s1 is current\n"
    )
    assert served.host.scanned == [f"{HERE}/old"]


async def test_scan_that_refuses(served: Served) -> None:
    refused = Scanned(path="/o/x", name=None, outcome=ScanOutcome.REFUSED, detail="it is damaged")
    served.host.scan_result = ScanResult(found=(refused,))
    out, _ = await raw(served, "snapshot-import vm1 --scan /o", status=1)
    assert out.decode() == "refused   ?  /o/x: it is damaged\n0 of 1 snapshots imported\n"


@pytest.mark.parametrize(
    "line",
    [
        "snapshot-export vm1 s1 --metadata /a --xml /b",
        "snapshot-export vm1 s1 /x --metadata /a",
        "snapshot-export vm1 s1 --metadata /a --chained",
        "snapshot-import vm1 --scan /a --metadata /b",
        "snapshot-import vm1 --scan /a --name n",
        "snapshot-import vm1 --scan /a --disk-dir /b",
        "snapshot-fsck",
    ],
)
async def test_what_makes_no_sense(served: Served, line: str) -> None:
    await run(served, line, status=1)
