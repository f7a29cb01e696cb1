"""STATE_DIR/VM/.thaw-owed.json: while qsnapd may have frozen the file systems of a guest.

A record of its own, because a snapshot may be committed, or undone, before its guest is thawed.
"""

from pathlib import Path

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, StoreError
from qsnapd.image.files import replace_file, sync_directory
from qsnapd.model.freeze import OwedThaw
from qsnapd.store.snapshots import VmStore

OWED_THAW_NAME = ".thaw-owed.json"


def owe_thaw(store: VmStore, owed: OwedThaw) -> None:
    """From now on a thaw is owed, whoever dies; durable on return. Blocks.

    Raises: StoreError: it is not noted.
    """
    path = _path(store)
    try:
        replace_file(path, owed.model_dump_json(indent=1))
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc


def read_owed_thaw(store: VmStore) -> OwedThaw | None:
    """The thaw that is owed, if one is. Blocks.

    Raises: ManifestInvalid: another version of qsnapd wrote it. StoreError.
    """
    path = _path(store)
    try:
        return OwedThaw.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StoreError(f"cannot read {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        raise ManifestInvalid(
            f"{path} is not understood ({exc.errors()[0]['msg']}): the guest of VM {store.vm} may "
            f"be frozen; qsnapctl domfsthaw {store.vm} thaws it, and removes that file"
        ) from exc


def forget_owed_thaw(store: VmStore) -> None:
    """None is owed any more; durable on return. Blocks. Raises: StoreError."""
    path = _path(store)
    try:
        path.unlink()
        sync_directory(path.parent)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise StoreError(f"cannot remove {path}: {exc.strerror}") from exc


def _path(store: VmStore) -> Path:
    return store.directory / OWED_THAW_NAME
