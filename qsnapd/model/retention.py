"""What became of the snapshots that retention did not keep."""

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName


class Refusal(Frozen):
    """A snapshot that stays, though it need not be kept."""

    name: SnapshotName
    why: str
    """A sentence for people, with the way out."""


class Pruned(Frozen):
    """All of them, in the order of their turns."""

    deleted: tuple[SnapshotName, ...] = ()
    refused: tuple[Refusal, ...] = ()
