"""Every test in this folder runs against the fake QEMU, on a clock that jumps."""

import pytest

from tests.faults.inline import stay_in_this_thread


@pytest.fixture(autouse=True)
def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_in_this_thread(monkeypatch)
