"""What a daemon leaves to the next: the condition of a QEMU process, with its reason.

QEMU knows that it is paused, but not by whom.
"""

import logging

from pydantic import NonNegativeInt, ValidationError

from qsnapd.errors import StoreError
from qsnapd.model.base import Frozen
from qsnapd.model.state import Condition
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import ProcessIdentity

_log = logging.getLogger(__name__)


class _Remembered(Frozen):
    pid: NonNegativeInt
    start_time_ticks: NonNegativeInt
    condition: str


def remember(store: VmStore, identity: ProcessIdentity, condition: Condition) -> None:
    """Write the condition of this very process down. Blocks. Raises: StoreError."""
    known = _Remembered(
        pid=identity.pid,
        start_time_ticks=identity.start_time_ticks,
        condition=condition.name,
    )
    store.remember_state(known.model_dump_json())


def recall(store: VmStore, identity: ProcessIdentity) -> Condition | None:
    """What was last known of this very process; None if nothing is."""
    try:
        if (text := store.recall_state()) is None:
            return None
        known = _Remembered.model_validate_json(text)
        if (known.pid, known.start_time_ticks) == (identity.pid, identity.start_time_ticks):
            return Condition[known.condition]
    except (ValidationError, KeyError, StoreError) as exc:
        _log.warning("the remembered state of VM %s is not understood: %s", store.vm, exc)
    return None
