"""Command lines of virsh, one after the other on one VM, with `qsnapctl` in virsh's place.

Each is judged by its exit status, by what it prints, and by what has changed: which snapshots
there are, which of them is current, the VM's state and reason, and whether its disks have moved
to other images. What a line does not announce must not happen; and a line that is refused must
not have stopped the guest for a moment.
"""

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from qsnapd.cli.main import main
from qsnapd.control.client import Client

VM = "vm1"


@dataclass(frozen=True)
class Line:
    """One command line, as it would follow `virsh `."""

    words: str
    """`{place}` stands for what the session puts there, {vda} for the image vda is on now."""
    says: str = ""
    """Regular expression for all that is printed; on stderr if it fails."""
    status: int = 0
    adds: str = ""
    """Names of snapshots; "before-S" is the state that was kept when the VM was put back to S,
    TIME one that was given no name."""
    drops: str = ""
    current: str | None = None
    """The current snapshot, if this changes it; "-" for none."""
    state: str | None = None
    """As domstate --reason says it, if this changes it."""
    moves: str = ""
    """Disks that are on other images afterwards."""
    stops: bool = False
    """The guest stands still meanwhile, or from then on."""
    notes: bool = False
    """It may say something on stderr, too."""
    input: str | None = None
    """What {file} holds."""
    change: tuple[str, str, str] | None = None
    """What {file} holds: of what another line saved, and there one text in place of another."""
    saves: str = ""
    """Keeps what was printed under this name."""
    first: str = ""
    """A command that is run before."""
    editor: str | None = None
    """A command that edits the file in its last argument."""


def fails(words: str, says: str, **more: Any) -> Line:  # noqa: ANN401
    """A line that is refused, in words in which *says* is found."""
    return Line(words, rf"(?:note: .*\n)*error: (?s:.*)(?:{says})(?s:.*)", 1, **more)


@dataclass(frozen=True)
class Situation:
    """What a line can change."""

    snapshots: frozenset[str]
    current: str
    state: str
    images: Mapping[str, str]


class Session:
    """Runs lines against the daemon at *control*, and notes all that is not as announced."""

    def __init__(self, control: Path, monitor_log: Path, places: Mapping[str, str]) -> None:
        self._control = control
        self._monitor_log = monitor_log
        self._places = places
        self._saved: dict[str, str] = {}
        self._now = self.look()
        self.wrong: list[str] = []

    def run(self, lines: Sequence[Line]) -> None:
        self._now = self.look()
        for line in lines:
            self._run(line)

    def _run(self, line: Line) -> None:
        before, stops = self._now, self._stops()
        words = self._filled(line.words)
        self._prepare(line)
        with mock.patch.dict(os.environ, {"VISUAL": line.editor or "false"}):
            status, out, err = self.call(words)
        after = self._now = self.look()
        self._saved[line.saves] = out
        problems = []
        if status != line.status:
            problems.append(f"exit status {status}, not {line.status}")
        said, silent = (out, err) if status == 0 else (err, out)
        if not re.fullmatch(self._filled(line.says, re.escape), said):
            problems.append(f"it does not say {line.says!r}")
        if silent and not line.notes:
            problems.append("it says something on the other stream")
        problems += _differences(_expected(line, before), after, set(line.moves.split()))
        if self._stops() > stops and not line.stops:
            problems.append("the guest was stopped")
        if problems:
            listed = "".join(f"\n    {problem}" for problem in problems)
            self.wrong.append(f"virsh {words}{listed}\n    stdout: {out!r}\n    stderr: {err!r}")

    def _filled(self, text: str, quote: Callable[[str], str] = str) -> str:
        for name, place in {**self._now.images, **self._places}.items():
            text = text.replace(f"{{{name}}}", quote(place))
        return text

    def _prepare(self, line: Line) -> None:
        if line.first:
            subprocess.run(shlex.split(self._filled(line.first)), check=True)
        file = Path(self._places["file"])
        if line.change is not None:
            saved, old, new = line.change
            assert old in self._saved[saved], f"{line.words}: there is no {old}"
            file.write_text(self._saved[saved].replace(old, new, 1))
        elif line.input is not None:
            file.write_text(self._filled(line.input))

    def call(self, words: str) -> tuple[int, str, str]:
        """Run qsnapctl in this process; returns its exit status, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        argv = ["qsnapctl", "--socket", str(self._control), *shlex.split(words)]
        with (
            mock.patch.object(sys, "argv", argv),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as exc:
                status = exc.code if isinstance(exc.code, int) else 0
        return status, out.getvalue(), err.getvalue()

    def look(self) -> Situation:
        with Client(self._control) as client:
            snapshots = client.call("ListSnapshots", vm=VM)["snapshots"]
            vm = client.call("GetVm", vm=VM)["vm"]
            disks = client.call("ListDisks", vm=VM)["disks"] if vm["connected"] else []
        return Situation(
            snapshots=frozenset(_plain(snapshot["name"]) for snapshot in snapshots),
            current=next((_plain(s["name"]) for s in snapshots if s["current"]), "-"),
            state=f"{vm['state']} ({vm['reason']})",
            images={disk["target"]: disk["path"] for disk in disks},
        )

    def _stops(self) -> int:
        """How often QEMU has said that its guest stands still; each QEMU begins a new log."""
        return self._monitor_log.read_text(errors="replace").count('"event": "STOP"')


def _plain(name: str) -> str:
    name = re.sub(r"^\d{8}T\d{6}\.\d{6}Z$", "TIME", name)
    return re.sub(r"^(before-.*)-[0-9a-f]{8}$", r"\1", name)


def _expected(line: Line, before: Situation) -> Situation:
    return Situation(
        snapshots=(before.snapshots | set(line.adds.split())) - set(line.drops.split()),
        current=before.current if line.current is None else line.current,
        state=before.state if line.state is None else line.state,
        images=before.images,
    )


def _differences(expected: Situation, found: Situation, moved: set[str]) -> list[str]:
    problems = [
        f"{what} {is_so!r}, not {should!r}"
        for what, should, is_so in (
            ("snapshots are", sorted(expected.snapshots), sorted(found.snapshots)),
            ("current is", expected.current, found.current),
            ("the VM is", expected.state, found.state),
        )
        if should != is_so
    ]
    if expected.images and found.images:  # it ran before and after
        changed = {disk for disk, path in found.images.items() if expected.images[disk] != path}
        if changed != moved:
            problems.append(f"disks on other images: {sorted(changed)}, not {sorted(moved)}")
    return problems
