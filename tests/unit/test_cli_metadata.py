"""snapshot-dumpxml and snapshot-edit, as people run them."""

import json
import os
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.xml.snapshot import read_snapshot, write_snapshot
from tests.unit.control_host import Served, manifest
from tests.unit.test_cli import QSNAPCTL, environment, run


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def edit(served: Served, line: str, editor: str, status: int = 0) -> str:
    """Run `qsnapctl snapshot-edit LINE` with this editor; what it printed, wherever."""
    variables = {"EDITOR": editor, "VISUAL": ""}
    done = await trio.run_process(
        [QSNAPCTL, "snapshot-edit", *line.split()],
        env=environment(served) | variables,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == status, done.stderr.decode()
    return (done.stderr if status else done.stdout).decode()


def sed(*commands: str) -> str:
    return shlex.join(["sed", "-i", *(f"-e{command}" for command in commands)])


async def test_dumpxml(served: Served) -> None:
    xml = await run(served, "snapshot-dumpxml vm1 s1")
    assert xml == write_snapshot(manifest("s1"))
    assert read_snapshot(xml.encode()) == manifest("s1")
    line = "snapshot-dumpxml --domain vm1 --snapshotname s1 --security-info"
    assert await run(served, line) == xml
    current = await run(served, "snapshot-dumpxml vm1 --current")
    assert read_snapshot(current.encode()).name == "s2"
    assert json.loads(await run(served, "--json snapshot-dumpxml vm1 s1")) == {"xml": xml}


async def test_dumpxml_in_part(served: Served) -> None:
    line = "snapshot-dumpxml vm1 s2 --xpath"
    assert await run(served, f"{line} //name") == (
        "<name>s2</name>\n<name>s1</name>\n<name>vm1</name>\n"
    )
    assert await run(served, f"{line} /domainsnapshot/name --wrap") == (
        "<nodes>\n  <name>s2</name>\n</nodes>\n"
    )
    assert await run(served, f"{line} /domainsnapshot/memory/@file") == ' file="/s/memory.img"\n'
    assert await run(served, f"{line} string(//state)") == "running\n"
    assert await run(served, f"{line} //nothing") == ""
    assert "Incorrect xpath '//['" in await run(served, f"{line} //[", status=1)


async def test_edit_that_changes_nothing(served: Served) -> None:
    before = dict(served.host.manifests)
    said = await edit(served, "vm1 s1", "true")
    assert said == "Snapshot s1 XML configuration not changed.\n"
    assert served.host.manifests == before


async def test_edit_a_description_and_a_parent(served: Served) -> None:
    editor = sed("s|<state>|<description>new</description><state>|", "s|<name>s1<|<name>s0<|")
    served.host.manifests["s0"] = manifest("s0")
    assert await edit(served, "vm1 s2", editor) == "Snapshot s2 edited.\n"
    update = {"description": "new", "parent": "s0"}
    before = manifest("s2", "s1", minute=1)
    assert served.host.manifests["s2"] == before.model_copy(update=update)


async def test_a_new_name_needs_a_flag(served: Served) -> None:
    editor = sed("s|<name>s1<|<name>s9<|")
    said = await edit(served, "vm1 s1", editor, status=1)
    assert said == "error: Must use --rename or --clone to change s1 to s9\n"
    assert sorted(served.host.manifests) == ["s1", "s2"]


async def test_rename(served: Served) -> None:
    editor = sed("0,/<name>s1</s||<name>s9<|", "s|<state>|<description>new</description><state>|")
    assert await edit(served, "vm1 s1 --rename --current", editor) == "Snapshot s1 renamed to s9.\n"
    assert sorted(served.host.manifests) == ["s2", "s9"]
    assert served.host.manifests["s9"].description == "new"
    assert served.host.current_name == "s9"


async def test_clone(served: Served) -> None:
    editor = sed("0,/<name>s1</s||<name>s9<|", "s|<state>|<description>new</description><state>|")
    assert await edit(served, "vm1 s1 --clone", editor) == "Snapshot s1 cloned to s9.\n"
    assert served.host.manifests["s1"] == manifest("s1")
    update = {"name": "s9", "description": "new"}
    assert served.host.manifests["s9"] == manifest("s1").model_copy(update=update)


async def test_edit_the_current_one(served: Served) -> None:
    editor = sed("s|<state>|<description>new</description><state>|")
    assert await edit(served, "vm1 --current", editor) == "Snapshot s2 edited.\n"
    assert served.host.manifests["s2"].description == "new"


async def test_a_name_that_is_taken(served: Served) -> None:
    editor = sed("0,/<name>s1</s||<name>s2<|")
    for flag in ("--rename", "--clone"):
        said = await edit(served, f"vm1 s1 {flag}", editor, status=1)
        assert said == "error: there is a snapshot s2 already\n"
    assert served.host.manifests["s2"] == manifest("s2", "s1", minute=1)


@pytest.mark.parametrize(
    ("line", "editor", "status", "error"),
    [
        ("vm1 s1", sed("s|<state>running|<state>paused|"), 1, "<state> contradicts the manifest"),
        ("vm1 s1", "truncate -s 0", 1, "cannot be parsed"),
        ("vm1 s1", "false", 1, "the editor 'false' failed with status 1; nothing changed"),
        ("vm1 s1", "/nowhere/ed", 1, "cannot run the editor '/nowhere/ed'"),
        ("vm1 s1", "'unclosed", 1, "cannot run the editor"),
        ("vm1 s1 --rename --clone", "true", 1, "mutually exclusive"),
        ("vm1", "true", 1, "--snapshotname or --current is required"),
        ("vm1 none", "true", 1, "no snapshot 'none'"),
    ],
)
async def test_what_comes_to_nothing(
    served: Served, line: str, editor: str, status: int, error: str
) -> None:
    before = dict(served.host.manifests)
    assert error in await edit(served, line, editor, status)
    assert served.host.manifests == before


async def test_the_editor_sees_a_file_for_its_owner_alone(
    served: Served, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    # the editor is run without a shell: the words are its own, whatever they look like
    editor = shlex.join(["sh", "-c", f'stat -c "%a %n" "$2" > {seen}; echo "$1" >> {seen}', "-"])
    await edit(served, "vm1 s1", f"{editor} ';$(id)'")
    mode, name, words = seen.read_text().split()
    assert (mode, words) == ("600", ";$(id)")
    assert name.endswith("/s1.xml")
    assert not await trio.Path(name).parent.exists()


async def test_who_sits_at_a_terminal_may_try_again(served: Served, tmp_path: Path) -> None:
    script, flag = tmp_path / "editor", tmp_path / "flag"
    await trio.Path(script).write_text(
        f'if [ -e {flag} ]; then sed -i "s|<oops/>|<description>new</description>|" "$1"\n'
        f'else touch {flag}; sed -i "s|<state>|<oops/><state>|" "$1"; fi\n'
    )
    terminal, theirs = os.openpty()
    os.write(terminal, b"y\n")
    try:
        done = await trio.run_process(
            [QSNAPCTL, "snapshot-edit", "vm1", "s1"],
            env=environment(served) | {"VISUAL": f"sh {script}"},
            stdin=theirs,
            capture_stdout=True,
            capture_stderr=True,
        )
    finally:
        os.close(theirs)
        os.close(terminal)
    assert b"unknown element <oops>" in done.stderr
    assert b"Try again?" in done.stderr
    assert done.stdout.endswith(b"Snapshot s1 edited.\n")
    assert served.host.manifests["s1"].description == "new"


async def test_visual_comes_first(served: Served) -> None:
    done = await trio.run_process(
        [QSNAPCTL, "snapshot-edit", "vm1", "s1"],
        env=environment(served) | {"VISUAL": "true", "EDITOR": "false"},
        capture_stdout=True,
    )
    assert done.stdout == b"Snapshot s1 XML configuration not changed.\n"
