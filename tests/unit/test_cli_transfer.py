"""The verbs that take snapshots to other hosts, as people run them."""

import json
import os
import pty
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.model.transfer import ExportRequest, ImportRequest
from tests.unit.control_host import Served
from tests.unit.test_cli import QSNAPCTL, environment, run

HERE = os.getcwd()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def raw(
    served: Served, line: str, *, stdin: bytes = b"", status: int = 0
) -> tuple[bytes, bytes]:
    """Run `qsnapctl LINE`; return stdout and stderr as they are."""
    done = await trio.run_process(
        [QSNAPCTL, *line.split()],
        env=environment(served),
        stdin=stdin,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout, done.stderr


@pytest.mark.parametrize("verb", ["snapshot-export", "snapshot-cp"])
async def test_to_a_directory(served: Served, tmp_path: Path, verb: str) -> None:
    target = tmp_path / "e"
    said = await run(served, f"{verb} vm1 s1 {target} --chained")
    assert said == f"Domain snapshot s1 exported to {target} (4.000 KiB)\n"
    request = ExportRequest(name="s1", directory=str(target), chained=True)
    assert served.host.transfers == [request]
    [file] = json.loads(await run(served, f"--json {verb} vm1 s1 {target}"))
    assert (file["name"], file["data_bytes"]) == ("memory.img", 4096)


async def test_relative_directories_are_the_callers(served: Served) -> None:
    await run(served, "snapshot-export vm1 s1 sub/e")
    await raw(served, "snapshot-import vm1 sub/e --disk-dir d --name n")
    assert served.host.transfers == [
        ExportRequest(name="s1", directory=f"{HERE}/sub/e"),
        ImportRequest(directory=f"{HERE}/sub/e", name="n", disk_directory=f"{HERE}/d"),
    ]


async def test_tar_to_standard_output_is_nothing_but_the_tar(served: Served) -> None:
    assert await raw(served, "snapshot-export vm1 s1 --tar") == (b"stream", b"")
    assert await raw(served, "--json snapshot-export vm1 s1 --tar -") == (b"stream", b"")


async def test_tar_to_a_new_file(served: Served, tmp_path: Path) -> None:
    archive = tmp_path / "s1.tar"
    said = await run(served, f"snapshot-export vm1 s1 --tar {archive}")
    assert said == f"Domain snapshot s1 exported to {archive} (4.000 KiB)\n"
    assert archive.read_bytes() == b"stream"
    assert archive.stat().st_mode & 0o777 == 0o600
    said = await run(served, f"snapshot-export vm1 s1 --tar {archive}", status=1)
    assert said == f"error: cannot create {archive}: File exists\n"
    assert archive.read_bytes() == b"stream"


async def test_file_of_a_failed_export_is_removed(served: Served, tmp_path: Path) -> None:
    archive = tmp_path / "s1.tar"
    await run(served, f"snapshot-export vm9 s1 --tar {archive}", status=1)
    assert not archive.exists()


async def test_import_says_what_is_in_the_way(served: Served, tmp_path: Path) -> None:
    archive = tmp_path / "s1.tar"
    archive.write_bytes(b"from a file")
    said = (b"Domain snapshot n imported\n", b"note: a note\n")
    assert await raw(served, f"snapshot-import vm1 --name n --tar {archive}") == said
    assert await raw(served, "snapshot-import vm1 --name n --tar", stdin=b"from a pipe") == said
    assert served.host.read == [b"from a file", b"from a pipe"]
    out, _ = await raw(served, f"--json snapshot-import vm1 --name n --tar {archive}")
    assert json.loads(out)["notes"] == ["a note"]


@pytest.mark.parametrize(
    "line",
    [
        "snapshot-export vm1 s1",
        "snapshot-export vm1 s1 /x --tar /y",
        "snapshot-export vm1",
        "snapshot-cp vm1 s1",
        "snapshot-import vm1",
        "snapshot-import vm1 /x --tar",
    ],
)
async def test_where_must_be_said_once(served: Served, line: str) -> None:
    await run(served, line, status=1)
    assert served.host.transfers == []


@pytest.mark.parametrize("line", ["snapshot-export vm1 s1 --tar", "snapshot-import vm1 --tar"])
def test_terminals_are_spared(tmp_path: Path, line: str) -> None:
    parent, terminal = pty.openpty()
    done = subprocess.run(
        [QSNAPCTL, *line.split()],
        env={**os.environ, "QSNAPD_SOCKET": str(tmp_path / "nobody")},
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == 1
    assert b"terminal: use a pipe or a file" in done.stderr
    for fd in (parent, terminal):
        os.close(fd)
