"""What Tab gives: verbs, flags, and the names that the daemon knows."""

import os
import shlex
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qsnapd.cli.completion import ANSWER_LIMIT_S, SHELLS
from tests.unit.control_host import Served
from tests.unit.test_cli import QSNAPCTL, environment, run

Asking = Callable[[Served, str], Awaitable[list[str]]]

LINES = [
    ("snapshot-in", "snapshot-info"),
    ("snapshot-lis", "snapshot-list"),
    ("domjob", "domjobabort domjobinfo"),
    ("domstate ", "vm1 vm2"),
    ("domstate vm1", "vm1"),
    ("domstate x", ""),
    ("domstate vm1 ", ""),
    ("domstate --domain ", "vm1 vm2"),
    ("snapshot-info vm1 ", "s1 s2"),
    ("snapshot-info vm2 ", ""),
    ("snapshot-info --domain vm1 ", "s1 s2"),
    ("snapshot-info --snapshotname s1 ", "vm1 vm2"),
    ("snapshot-info vm1 --snapshotname ", "s1 s2"),
    ("snapshot-revert vm1 s", "s1 s2"),
    ("snapshot-list vm1 --from ", "s1 s2"),
    ("snapshot-list --le", "--leaves"),
    ("snapshot-revert vm1 s1 --re", "--read-ahead"),
    ("snapshot-create-as vm1 s9 words ", "vda"),
    ("snapshot-create-as vm1 --diskspec ", "vda"),
    ("domblkinfo vm1 ", "vda"),
    ("help snapshot-par", "snapshot-parent"),
    ("completion ", "bash fish zsh"),
]
"""What stands on the line, and what it could become."""


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def shell(served: Served, argv: list[str], **more: str) -> str:
    """Run a shell with this qsnapctl in its path; returns what it prints."""
    path = f"{Path(QSNAPCTL).parent}:{os.environ['PATH']}"
    done = await trio.run_process(
        argv,
        env=environment(served) | {"PATH": path, **more},
        capture_stdout=True,
        capture_stderr=True,
    )
    assert done.stderr == b""
    return done.stdout.decode()


async def in_bash(served: Served, *lines: str) -> list[list[str]]:
    """Have bash itself complete the lines; the function is called as readline calls it."""
    script = "source <(qsnapctl completion bash)\n"
    for line in lines:
        words = ["qsnapctl", *line.split(" ")]
        script += (
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}\n"
            'COMPREPLY=(); _qsnapctl_completion qsnapctl; echo "${COMPREPLY[@]}"\n'
        )
    said = await shell(served, ["bash", "--norc", "-c", script])
    return [sorted(found.split()) for found in said.splitlines()]


async def as_zsh_asks(served: Served, line: str) -> list[str]:
    """Ask as zsh's script does: three lines come back for each candidate."""
    words = ["qsnapctl", *line.split(" ")]
    said = await shell(
        *(served, [QSNAPCTL]),
        COMP_WORDS=" ".join(words),
        COMP_CWORD=str(len(words) - 1),
        _QSNAPCTL_COMPLETE="zsh_complete",
    )
    return sorted(said.splitlines()[1::3])


async def as_fish_asks(served: Served, line: str) -> list[str]:
    """Ask as fish's script does: `type,value` and, after a tab, a help text."""
    said = await shell(
        *(served, [QSNAPCTL]),
        COMP_WORDS=f"qsnapctl {line}",
        COMP_CWORD=line.split(" ")[-1],
        _QSNAPCTL_COMPLETE="fish_complete",
    )
    return sorted(found.split(",", 1)[1].split("\t")[0] for found in said.splitlines() if found)


async def test_in_bash(served: Served) -> None:
    found = await in_bash(served, *(line for line, _ in LINES))
    lines = {line: " ".join(names) for (line, _), names in zip(LINES, found, strict=True)}
    assert lines == dict(LINES)


@pytest.mark.parametrize("ask", [as_zsh_asks, as_fish_asks])
async def test_other_shells_get_the_same(served: Served, ask: Asking) -> None:
    for line, expected in LINES[::3]:
        assert await ask(served, line) == expected.split(), line


async def test_a_file_is_the_shells_own_business(served: Served) -> None:
    said = await shell(
        *(served, [QSNAPCTL]),
        COMP_WORDS="qsnapctl snapshot-create vm1 /tm",
        COMP_CWORD="3",
        _QSNAPCTL_COMPLETE="bash_complete",
    )
    assert said == "file,/tm\n"


async def test_without_a_daemon_there_is_silence(served: Served) -> None:
    line = "--socket /nowhere snapshot-info vm1 "
    assert await in_bash(served, line, "snapshot-info vm9 ") == [[], []]


async def test_a_daemon_that_does_not_answer_is_not_waited_for(
    served: Served, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        with trio.fail_after(20 * ANSWER_LIMIT_S):
            assert await in_bash(served, f"--socket {tmp_path}/deaf domstate ") == [[]]


@pytest.mark.parametrize("shell_name", SHELLS)
async def test_each_shell_has_a_script(served: Served, shell_name: str) -> None:
    said = await run(served, f"completion {shell_name}")
    assert f"{shell_name}_complete" in said


async def test_no_other_shell_has_one(served: Served) -> None:
    assert "bash, zsh, fish" in await run(served, "completion tcsh", status=1)
