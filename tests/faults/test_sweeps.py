"""All or nothing: a checkpoint cancelled at any step, or failing at any command."""

from dataclasses import replace

import pytest

from qsnapd.model.snapshot import ImageFormat, Strategy
from tests.faults.fake_migration import SavingScript
from tests.faults.fake_transport import Fault
from tests.faults.scene import CASES, Case
from tests.faults.sweeps import cancel_sweep, death_sweep, fault_sweep, recovery_sweep

STOPPED, PRECOPY, BACKGROUND = (Case("10.0.2", strategy) for strategy in Strategy)
DISK_ONLY = Case("10.0.2", None)
OLD_BACKGROUND = Case("7.2.22", Strategy.BACKGROUND)

cases = pytest.mark.parametrize("case", CASES, ids=str)
# Lost before a command is the same as lost after the one that precedes it.
SWEPT = (Fault.REFUSED, Fault.LATE, Fault.LOST_AFTER)
faults = pytest.mark.parametrize("fault", SWEPT, ids=lambda fault: fault.name.lower())


@cases
def test_cancelled_at_any_step(case: Case) -> None:
    assert cancel_sweep(case) == []


@pytest.mark.parametrize(
    "case",
    [
        replace(STOPPED, status="paused"),
        replace(BACKGROUND, status="paused"),
        replace(STOPPED, disks=2),
        replace(DISK_ONLY, disks=2),
        replace(DISK_ONLY, status="paused"),
        replace(STOPPED, confined=True),
        replace(BACKGROUND, image_format=ImageFormat.STREAM, disks=0),
    ],
    ids=str,
)
def test_other_vms_cancelled_at_any_step(case: Case) -> None:
    assert cancel_sweep(case) == []


@cases
@faults
def test_any_command_fails(case: Case, fault: Fault) -> None:
    assert fault_sweep(case, fault) == []


@faults
@pytest.mark.parametrize("case", [STOPPED, PRECOPY, BACKGROUND], ids=str)
def test_any_command_fails_before_or_after_a_save_that_failed(case: Case, fault: Fault) -> None:
    """The second half of such a run is all undoing, which must survive faults as well."""
    stage = "saving" if case is BACKGROUND else "device"
    assert fault_sweep(replace(case, saving=SavingScript(fails_in=stage)), fault) == []


@faults
def test_any_command_fails_where_files_are_handed_over(fault: Fault) -> None:
    assert fault_sweep(replace(STOPPED, confined=True), fault) == []


@pytest.mark.parametrize("case", [STOPPED, BACKGROUND, OLD_BACKGROUND], ids=str)
@pytest.mark.parametrize("lost_at", ["transaction", "cont"])
def test_recovery_is_cut_off_at_any_command(case: Case, lost_at: str) -> None:
    assert recovery_sweep(case, lost_at) == []


@pytest.mark.parametrize("case", [STOPPED, BACKGROUND], ids=str)
def test_qemu_ends_at_any_command(case: Case) -> None:
    assert death_sweep(case) == []


@faults
@pytest.mark.parametrize("case", [DISK_ONLY, replace(DISK_ONLY, version="7.2.22")], ids=str)
def test_any_command_fails_of_a_disk_only_one(case: Case, fault: Fault) -> None:
    assert fault_sweep(case, fault) == []


def test_qemu_ends_at_any_command_of_a_disk_only_one() -> None:
    assert death_sweep(DISK_ONLY) == []


def test_recovery_of_a_disk_only_one_is_cut_off() -> None:
    assert recovery_sweep(DISK_ONLY, "transaction") == []
