"""STATE_DIR/VM/.thaw-owed.json: while qsnapd may have frozen the file systems of a guest.

A record of its own, because a snapshot may be committed, or undone, before its guest is thawed.
"""

from qsnapd.model.freeze import OwedThaw
from qsnapd.store.record import Record
from qsnapd.store.snapshots import VmStore

OWED_THAW_NAME = ".thaw-owed.json"


def owe_thaw(store: VmStore, owed: OwedThaw) -> None:
    """From now on a thaw is owed, whoever dies; durable on return. Blocks.

    Raises: StoreError: it is not noted.
    """
    _record(store).write(owed)


def read_owed_thaw(store: VmStore) -> OwedThaw | None:
    """The thaw that is owed, if one is. Blocks.

    Raises: ManifestInvalid: another version of qsnapd wrote it. StoreError.
    """
    return _record(store).read()


def forget_owed_thaw(store: VmStore) -> None:
    """None is owed any more; durable on return. Blocks. Raises: StoreError."""
    _record(store).clear()


def _record(store: VmStore) -> Record[OwedThaw]:
    return Record(
        store.directory / OWED_THAW_NAME,
        OwedThaw,
        remedy=f": the guest of VM {store.vm} may be frozen; qsnapctl domfsthaw {store.vm} thaws "
        "it, and removes that file",
    )
