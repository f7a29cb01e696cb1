"""Whatever is done to a VM's snapshots, and in whatever order: each stays what it was.

Random walks, each from a seed that a failure names. QSNAPD_WALK_SEEDS="7 8 9" walks from other
ones, QSNAPD_WALK_STEPS=1000 goes further.
"""

import os
import random
from pathlib import Path

import pytest

from tests.harness import Disk, open_vm
from tests.parts import Qemu
from tests.real.cases import LAZY, VM, each_qemu
from tests.real.walk import Walk
from tests.rig import open_rig

SEEDS = [int(word) for word in os.environ.get("QSNAPD_WALK_SEEDS", "1 2").split()]
STEPS = int(os.environ.get("QSNAPD_WALK_STEPS", "45"))
DISKS = (
    Disk("qcow2", "virtio", "-blockdev", size_mib=1),
    Disk("raw", "scsi", "-drive", size_mib=1),
)
RESTART_PROBABILITY = 0.06


@each_qemu
@pytest.mark.parametrize("seed", SEEDS)
async def test_every_snapshot_stays_what_it_was(qemu: Qemu, seed: int, tmp_path: Path) -> None:
    restarts = random.Random(-seed)
    async with open_vm(qemu, LAZY, disks=DISKS, memory_mib=8) as vm:
        walk: Walk | None = None
        left = STEPS
        try:
            while left > 0:
                async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
                    if walk is None:
                        walk = Walk(vm, rig, seed)
                    walk.rig = rig
                    await walk.check()
                    while left > 0:
                        left -= 1
                        await walk.step()
                        if restarts.random() < RESTART_PROBABILITY:
                            walk.done.append("restart of the daemon")
                            break
        except BaseException as exc:
            if walk is not None:
                exc.add_note(f"seed {seed}, QEMU {qemu}: " + "; ".join(walk.done))
            raise
