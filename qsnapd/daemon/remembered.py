"""What a daemon leaves to the next: the condition of a QEMU process, with its reason.

QEMU knows that it is paused, but not by whom.
"""

import json
import logging

from qsnapd.errors import StoreError
from qsnapd.model.state import Condition
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import ProcessIdentity

_log = logging.getLogger(__name__)


def remember(store: VmStore, identity: ProcessIdentity, condition: Condition) -> None:
    """Write the condition of this very process down. Blocks. Raises: StoreError."""
    words = {
        "pid": identity.pid,
        "start_time_ticks": identity.start_time_ticks,
        "condition": condition.name,
    }
    store.remember_state(json.dumps(words))


def recall(store: VmStore, identity: ProcessIdentity) -> Condition | None:
    """What was last known of this very process; None if nothing is."""
    try:
        known = json.loads(store.recall_state() or "{}")
        if (known.get("pid"), known.get("start_time_ticks")) == (
            identity.pid,
            identity.start_time_ticks,
        ):
            return Condition[known["condition"]]
    except (ValueError, KeyError, AttributeError, StoreError) as exc:
        _log.warning("the remembered state of VM %s is not understood: %s", store.vm, exc)
    return None
