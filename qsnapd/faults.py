"""Numbered points at which a fault can be planted, to prove what failures and crashes leave.

QSNAPD_FAULT=NUMBER:ACTION[,NUMBER:ACTION...] plants faults; unset, every point is passed at
once. Each of them strikes once, when its point is reached first:

    error   a foreseeable failure is raised there
    hang    what goes on there never ends by itself
    kill    the process gets SIGKILL
    stop    the process gets SIGSTOP, and goes on there at SIGCONT

The points are the transitions of jobs: what was done before one is true, what comes after it is
not begun. `qsnapd faults` lists them.
"""

import logging
import os
import signal
import threading
from enum import Enum, StrEnum
from typing import NoReturn, Self

import trio

from qsnapd.errors import ConfigError, QsnapError

VARIABLE = "QSNAPD_FAULT"

_log = logging.getLogger(__name__)


class PlantedFault(QsnapError):
    """Somebody wanted to see what happens."""

    code = "planted-fault"


class Action(StrEnum):
    ERROR = "error"
    HANG = "hang"
    KILL = "kill"
    STOP = "stop"
    """What others do meanwhile, they do at exactly this point."""


class Point(Enum):
    """All points. A number that was given once is never given to another."""

    number: int
    words: str
    """What is true there."""

    def __new__(cls, number: int, words: str) -> Self:
        point = object.__new__(cls)
        point._value_ = number
        point.number, point.words = number, words
        return point

    # --- taking a snapshot ---
    CREATE_PLANNED = 1, "the journal has the plan; nothing is made"
    CREATE_CAPABILITIES_SET = 2, "QEMU has the migration capabilities of the plan"
    CREATE_STAGED = 3, "the folder is made in which the snapshot grows"
    CREATE_FILES_MADE = 4, "files are made, and the journal does not know them yet"
    CREATE_FILES_NOTED = 5, "the journal knows the files by inode"
    CREATE_OVERLAYS_FILLED = 6, "the overlays are complete, under partial names"
    CREATE_OVERLAYS_PUBLISHED = 7, "the overlays have their names"
    CREATE_NODES_ADDED = 8, "QEMU has the overlays open"
    CREATE_PARAMETERS_SET = 9, "QEMU has the migration parameters of the plan"
    CREATE_MEMORY_HANDED_OVER = 10, "QEMU has the file for the memory"
    CREATE_PREPARED = 11, "all is prepared; the guest runs and has noticed nothing"
    CAPTURE_STOPPED = 12, "the guest stands still"
    CAPTURE_PIVOTED = 13, "the disks are on their overlays"
    CAPTURE_SAVING = 14, "QEMU has begun to save memory"
    CAPTURE_SWITCHOVER = 15, "precopy: QEMU has stopped the guest and waits for its disks to move"
    CAPTURE_CONTINUED = 16, "precopy: QEMU writes what is left of the memory"
    CAPTURE_CAPTURED = 17, "background: memory is protected, the first page saved"
    CAPTURE_RELEASED = 18, "background: the guest runs again; memory is being saved"
    CAPTURE_SAVED = 19, "QEMU has written all memory"
    CAPTURE_LEFT = 20, "the capture is over; a guest that ran runs"
    CAPTURE_FROZEN = 21, "the guest's file systems are frozen"
    CAPTURE_THAWED = 22, "they are thawed"
    FINISH_SYNCED = 23, "the memory image is on stable storage"
    FINISH_SEALED = 24, "its bitmaps are written, or its holes punched"
    FINISH_VERIFIED = 25, "it is proven to be whole"
    COMMIT_MEMORY_NAMED = 26, "a memory image elsewhere has its name"
    COMMIT_OVERLAYS_NOTED = 27, "it is noted which images qsnapd has made"
    COMMIT_MANIFEST_WRITTEN = 28, "the manifest is written, in the folder with the partial name"
    COMMITTED = 29, "the snapshot exists"
    SETTLE_CURRENT_SET = 30, "it is current"
    SETTLE_QEMU_RELEASED = 31, "QEMU has its own capabilities and parameters back"
    SETTLED = 32, "the journal is clear"

    # --- undoing that, in the job or by a later daemon ---
    UNDO_SAVE_SETTLED = 40, "no save is under way any more"
    UNDO_GUEST_RUNS = 41, "a guest that ran runs again"
    UNDO_MERGING = 42, "the overlays are being merged back"
    UNDO_MERGED = 43, "the disks are on the images they were on"
    UNDO_SAVES_AGAIN = 44, "QEMU can save memory again"
    UNDO_QEMU_RELEASED = 45, "QEMU has its own capabilities and parameters back"
    UNDO_NODES_REMOVED = 46, "QEMU has let go of the overlays"
    UNDO_FILES_REMOVED = 47, "all files that were made are removed"
    UNDO_UNSTAGED = 48, "so is the folder"
    UNDONE = 49, "the journal is clear"
    OFFLINE_MERGED = 50, "QEMU has ended: the overlays are merged by qemu-img"
    OFFLINE_FILES_REMOVED = 51, "QEMU has ended: all files that were made are removed"

    # --- putting a VM back ---
    REVERT_PLANNED = 60, "the journal has the plan of a revert; nothing is made"
    REVERT_FILES_MADE = 61, "its overlays are made, and the view of the memory"
    REVERT_KEPT = 62, "the present state is kept as a snapshot, the guest held"
    REVERT_RETURN_NOTED = 63, "the journal knows how that state comes back"
    REVERT_PREPARED = 64, "whoever starts QEMU knows what to start"
    REVERT_NO_RETURN = 65, "the journal says that there is no return"
    REVERT_ENDED = 66, "the old QEMU has ended"
    REVERT_STARTED = 67, "the new QEMU answers"
    REVERT_LOADED = 68, "it has loaded the memory; the guest stands still"
    REVERT_LET_GO = 69, "the journal says that the guest is let go"
    REVERT_RUNS = 70, "a guest that is to run runs"
    REVERT_LEASED = 71, "it is noted that the VM runs on the snapshot's files"
    REVERT_CURRENT_SET = 72, "the snapshot is current"
    REVERTED = 73, "the journal is clear"
    TAKE_BACK_NOTED = 74, "a revert has failed: the journal says that the kept state goes"
    TAKE_BACK_WITHDRAWN = 75, "the kept state is no snapshot any more"
    REVERT_UNDONE = 76, "a revert has failed before its point of no return, and is undone"

    # --- cloning ---
    CLONE_PLANNED = 80, "the journal has the plan of a clone; nothing is made"
    CLONE_FILES_MADE = 81, "its overlays are made, and the view of the memory"
    CLONE_LOADED = 82, "its QEMU has loaded the memory; the guest stands still"
    CLONE_REGISTERED = 83, "the clone exists"
    CLONE_RUNS = 84, "a guest that is to run runs"
    CLONED = 85, "the journal is clear"

    # --- deleting ---
    DELETE_PLANNED = 90, "the journal has the plan of a deletion"
    DELETE_MARKED = 91, "the snapshot is listed as being deleted"
    DELETE_MERGING = 92, "images are being merged"
    DELETE_AT_REST = 93, "all is copied; the guest's requests may be held back"
    DELETE_COPIED = 94, "the journal says that all is copied"
    DELETE_SWITCHED = 95, "QEMU uses the merged images"
    DELETE_NAMED = 96, "the images name the right ones below them"
    DELETE_RECORDED = 97, "the manifests of other snapshots say so, too"
    DELETE_UNLISTED = 98, "the snapshot is gone from the tree"
    DELETE_FILES_REMOVED = 99, "its files are removed"
    DELETED = 100, "the journal is clear"

    # --- thawing, renaming ---
    THAW_OWED = 110, "the store says that a thaw is owed; no freeze is sent"
    RENAME_NOTED = 120, "it is noted which name a snapshot gets"
    RENAME_COPIED = 121, "it has both names"
    RENAME_MOVED = 122, "what referred to the old name refers to the new one"
    RENAMED = 123, "the old name is gone"


_BY_NUMBER = {point.number: point for point in Point}


def parse(text: str) -> dict[Point, Action]:
    """What the variable says. Raises: ConfigError: it makes no sense."""
    try:
        pairs = [word.split(":") for word in text.split(",") if word]
        return {_BY_NUMBER[int(number)]: Action(action) for number, action in pairs}
    except (ValueError, KeyError) as exc:
        raise ConfigError(
            f"{VARIABLE}={text!r} makes no sense: it wants NUMBER:ACTION, or several behind "
            f"commas; actions are {', '.join(Action)}, and `qsnapd faults` lists the numbers"
        ) from exc


_planted: dict[Point, Action] = {}


def plant(faults: dict[Point, Action]) -> None:
    """Let these strike from now on, and no others."""
    _planted.clear()
    _planted.update(faults)
    for point, action in faults.items():
        _log.warning("a fault is planted: %s at point %d, %s", action, point.number, point.name)


def plant_from_environment() -> None:
    """Plant what the variable says. Raises: ConfigError."""
    if text := os.environ.pop(VARIABLE, None):  # not for the QEMUs we start
        plant(parse(text))


async def reach(point: Point) -> None:
    """Pass *point*, unless a fault is planted there. Raises: PlantedFault."""
    if point in _planted and _strike(point) is Action.HANG:
        await trio.sleep_forever()


def reach_in_thread(point: Point) -> None:
    """The same in a worker thread."""
    if point in _planted and _strike(point) is Action.HANG:
        threading.Event().wait()


def _strike(point: Point) -> Action:
    action = _planted.pop(point)
    _log.warning("a planted fault strikes: %s at point %d, %s", action, point.number, point.name)
    if action is Action.KILL:
        _die()
    if action is Action.STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    if action is Action.ERROR:
        raise PlantedFault(f"a fault was planted at point {point.number}: {point.words}")
    return action


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives this")
