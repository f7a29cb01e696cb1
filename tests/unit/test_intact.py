"""What may be restored or copied."""

import pytest

from qsnapd.errors import WrongState
from qsnapd.snapshot.intact import require_usable
from tests.unit.test_store import manifest


def test_a_snapshot_that_is_being_deleted_is_not_used() -> None:
    require_usable(manifest("s1"))
    with pytest.raises(WrongState, match="snapshot-delete vm1 s1"):
        require_usable(manifest("s1").model_copy(update={"deleting": True}))
