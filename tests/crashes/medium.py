"""What may be on disk when the power fails: a model of a file system that promises little.

What a file holds is safe once the file was synced, a name once its folder was. Before that any
of it may have arrived: names in the order in which they changed within a folder, and before
what they lead to. Only a rename arrives whole, as on every file system in use.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.crashes.content import EMPTY, Content, torn, zeros
from tests.crashes.recorder import FolderSynced, Named, Recorder, Step, Synced, Written
from tests.crashes.vault import Inode

Names = dict[Inode, dict[str, Inode]]
"""Of each folder."""


@dataclass(frozen=True)
class State:
    """What is there after a power failure."""

    kind: str
    folders: Mapping[Inode, Mapping[str, Inode]]
    """Those that a name leads to, with what their names lead to."""
    files: Mapping[Inode, Content]
    key: frozenset[tuple[str, bytes]] = field(repr=False)
    """The same for what looks the same."""


@dataclass
class _File:
    safe: Content | None = None
    """As it was last synced; None: it never was."""
    now: Content = EMPTY

    @property
    def is_qcow2(self) -> bool:
        """QEMU orders what it writes to one by syncs of its own: no mixture of two can be."""
        return bool(self.now.pieces) and self.now.pieces[0][1].startswith(b"QFI\xfb")

    def least(self) -> Content:
        return self.safe or EMPTY

    def any_of(self, chance: random.Random) -> Content:
        choices: list[Callable[[], Content]] = [lambda: self.now, self.least]
        if self.safe is None:
            choices.append(lambda: zeros(self.now))
        if not self.is_qcow2:
            choices.append(lambda: torn(self.least(), self.now, chance))
        return chance.choice(choices)()


class Medium:
    """Follows a recording step by step."""

    def __init__(self, recorder: Recorder) -> None:
        self.roots = tuple((root, root.stat().st_ino) for root in recorder.roots)
        self._safe: Names = {folder: {} for folder in recorder.folders}
        self._safe |= {folder: dict(names) for folder, names in recorder.at_first.items()}
        self._pending: list[Named] = []
        self._files: dict[Inode, _File] = {}

    def apply(self, step: Step) -> None:
        """Go on to when *step* has been done."""
        if isinstance(step, Named):
            self._pending.append(step)
        elif isinstance(step, Written):
            self._files.setdefault(step.file, _File()).now = step.content
        elif isinstance(step, Synced):
            self._files[step.file] = _File(step.content, step.content)
        elif isinstance(step, FolderSynced):
            safe = [named for named in self._pending if step.folder in _folders(named)]
            self._safe = _changed(self._safe, safe)
            self._pending = [named for named in self._pending if named not in safe]

    def states(self, seed: str, mixtures: int) -> Iterator[State]:
        """Yield what may be there if the power fails now; of mixtures a number, by *seed*."""
        nothing, everything = self._safe, _changed(self._safe, self._pending)
        yield self._state("everything has arrived", everything, lambda file: file.now)
        yield self._state("only what was synced", nothing, _File.least)
        yield self._state("names, but no data", everything, _File.least)
        yield self._state("data, but no names", nothing, lambda file: file.now)
        for number in range(mixtures):
            chance = random.Random(f"{seed} {number}")
            names = _changed(self._safe, self._some(chance))
            some = partial(_File.any_of, chance=chance)
            yield self._state(f"mixture {number} of {seed}", names, some)

    def _some(self, chance: random.Random) -> list[Named]:
        """Of the names that have changed: all up to one, or so in each folder, or any."""
        kind = chance.choice(("up to one", "in each folder", "any"))
        if kind == "up to one":
            return self._pending[: chance.randint(0, len(self._pending))]
        if kind == "any":
            return [named for named in self._pending if chance.random() < 0.5]
        left: dict[Inode, int] = {}
        for folder in sorted({f for named in self._pending for f in _folders(named)}):
            count = sum(folder in _folders(named) for named in self._pending)
            left[folder] = chance.randint(0, count)
        found = []
        for named in self._pending:
            folders = _folders(named)
            if any(left[folder] > 0 for folder in folders):
                found.append(named)
            for folder in folders:
                left[folder] -= 1
        return found

    def _state(self, kind: str, names: Names, content: Callable[[_File], Content]) -> State:
        folders: dict[Inode, dict[str, Inode]] = {}
        files: dict[Inode, Content] = {}
        key: set[tuple[str, bytes]] = set()

        def walk(folder: Inode, path: Path) -> None:
            folders[folder] = names[folder]
            for name, inode in sorted(names[folder].items()):
                if inode in names:
                    key.add((f"{path / name}/", b""))
                    walk(inode, path / name)
                else:
                    if inode not in files:
                        files[inode] = content(self._files[inode])
                    key.add((str(path / name), files[inode].key))

        for root, inode in self.roots:
            walk(inode, root)
        return State(kind, folders, files, frozenset(key))


def _folders(named: Named) -> set[Inode]:
    return {folder for folder, _, _ in named.entries}


def _changed(names: Names, steps: Iterable[Named]) -> Names:
    found = {folder: dict(entries) for folder, entries in names.items()}
    for step in steps:
        for folder, name, inode in step.entries:
            if inode is None:
                found[folder].pop(name, None)
            else:
                found[folder][name] = inode
    return found


def require_complete(recorder: Recorder) -> None:
    """See that what is there now is what the recording has come to, while it goes on."""
    with recorder.lock:
        medium = Medium(recorder)
        for step in recorder.steps:
            medium.apply(step)
        state = next(medium.states("", 0))
        for root, inode in medium.roots:
            _require_same(root, inode, state, recorder)


def _require_same(folder: Path, inode: Inode, state: State, recorder: Recorder) -> None:
    known = recorder.files.keys() | recorder.folders
    paths = (path for path in folder.iterdir() if path not in recorder.but)
    found = {path.name: path.lstat().st_ino for path in paths}
    # what else is there, QEMU has made
    assert {n: i for n, i in found.items() if i in known} == state.folders[inode], folder
    for name, leads_to in state.folders[inode].items():
        if leads_to in state.folders:
            _require_same(folder / name, leads_to, state, recorder)
