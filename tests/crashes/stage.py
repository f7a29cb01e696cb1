"""Putting a state in the place of what is there, at the very paths and with the very inodes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.crashes.medium import State
from tests.crashes.recorder import Recorder, put_away
from tests.crashes.vault import Inode


class Stage:
    """The folders that a recording was about, afterwards."""

    def __init__(self, recorder: Recorder) -> None:
        self._vault = recorder.vault
        self._folders = frozenset(recorder.folders)
        self._roots = {root: root.stat().st_ino for root in recorder.roots}
        self._but = recorder.but

    def set(self, state: State) -> None:
        """Have what *state* says below the roots, and nothing else but what was never looked at."""
        for root in self._roots:
            self._clear(root)
        for root, inode in self._roots.items():
            self._fill(root, inode, state)

    def _clear(self, folder: Path) -> None:
        for path in folder.iterdir():
            if path in self._but:
                continue
            if not path.is_dir() or path.is_symlink():
                path.unlink()
            elif path.stat().st_ino in self._folders:
                self._clear(path)
                self._vault.take_folder(str(path))
            else:
                shutil.rmtree(path)

    def _fill(self, folder: Path, inode: Inode, state: State) -> None:
        for name, leads_to in state.folders[inode].items():
            place = self._vault.name(leads_to)
            if leads_to in state.folders:
                place.rename(folder / name)
                self._fill(folder / name, leads_to, state)
            else:
                self._vault.fill(leads_to, state.files[leads_to])
                os.link(place, folder / name)

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Keep the inodes of removed folders, and do not wait for the disk, for the block."""
        rmdir: Any = partial(put_away, self._vault, os.rmdir)

        def nothing(_descriptor: object) -> None:
            pass

        with mock.patch.multiple(os, rmdir=rmdir, fsync=nothing, fdatasync=nothing):
            yield
