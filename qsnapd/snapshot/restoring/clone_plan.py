"""What a clone will be, and every reason not to make it: found before anything is made."""

import os
import secrets
import stat
from datetime import UTC, datetime
from pathlib import Path

from qsnapd.errors import TargetRefused
from qsnapd.model.plan import ClonePlan, OverlayPlan
from qsnapd.model.request import CloneRequest
from qsnapd.model.snapshot import DiskLayer, Manifest
from qsnapd.snapshot.restoring.revert_plan import (
    overlay_at,
    plan_start,
    read_manifest_line,
    require_no_qemu,
)
from qsnapd.snapshot.taking.plan_disks import folder_for_overlays, image_stem
from qsnapd.vm.apart import Apart, set_apart
from qsnapd.vm.apart_seen import renew_generation_id
from qsnapd.vm.launch import Parent
from qsnapd.vm.own_names import fitting

OF = ".of-"
"""Between the name of a disk and that of the clone that has one like it."""
CLONE_NAME_LIMIT = 64
"""Of the clone's, so many characters are repeated in the names of its disks."""


def plan_clone(
    manifest: Manifest,
    request: CloneRequest,
    parent: Parent,
    *,
    source: str,
    qmp_from: Path,
    directory: Path,
    loads_lazily: bool = False,
) -> ClonePlan:
    """Name all that the clone will have to itself, and compute its command line. Blocks.

    *source*: the original, *qmp_from*: its monitor. *directory*: where temporary files of the
    clone go.
    Touches nothing: reads file identities, and which names are taken.
    Raises: Blocked: the recorded command line cannot be used a second time, and why; or the
      monitor's path is too long. TargetRefused, WrongState: that path is in use.
    """
    if request.qmp is not None:
        require_free(request.clone, Path(request.qmp))
    token = secrets.token_hex(4)
    overlays = tuple(_overlay(disk, request.clone, token) for disk in manifest.disks)
    line = read_manifest_line(manifest, [overlay.path for overlay in overlays], parent)
    apart = set_apart(
        line.options,
        clone=request.clone,
        cwd=line.cwd,
        seed=secrets.token_hex(16),
        qmp_from=str(qmp_from),
        qmp_to=request.qmp,
        images=[overlay.path for overlay in overlays],
        mac=request.mac,
        uuid=request.uuid,
        substitutes=request.substitutes,
    )
    line = line.changed(renew_generation_id(apart.options))
    started = plan_start(
        *(manifest, request, line, token, directory), starts=True, loads_lazily=loads_lazily
    )
    # A disk-only snapshot's VM boots: there is nothing to look at while it stands.
    usual = manifest.state if manifest.memory is not None else "running"
    return ClonePlan(
        token=token,
        vm=request.clone,
        name=manifest.name,
        requested_at=datetime.now(UTC),
        to_running=(request.state or usual) == "running",
        launch=started.launch,
        loading=started.loading,
        lazy_refusal=started.lazy_refusal,
        overlays=overlays,
        source=source,
        qmp=apart.qmp,
        files=apart.made,
        pipes=apart.pipes,
        notes=_notes(apart, overlays),
    )


def require_free(clone: str, qmp: Path) -> None:
    """Refuse a monitor that cannot be had. Raises: Blocked, TargetRefused, WrongState."""
    require_no_qemu(clone, Path(fitting(str(qmp), "the monitor")))
    # QEMU replaces a socket that nobody listens on, and whatever else it finds there.
    if os.path.lexists(qmp) and not stat.S_ISSOCK(os.lstat(qmp).st_mode):
        raise TargetRefused(f"{qmp} exists already, and is no socket: choose another path")


def _overlay(disk: DiskLayer, clone: str, token: str) -> OverlayPlan:
    frozen = Path(disk.frozen)
    whose = clone[:CLONE_NAME_LIMIT]
    stem = image_stem(frozen).split(OF)[0]
    name = f"{stem}{OF}{whose}.{disk.target}-{token}.qcow2"
    return overlay_at(folder_for_overlays(disk) / name, disk)


def _notes(apart: Apart, overlays: tuple[OverlayPlan, ...]) -> tuple[str, ...]:
    disks = (f"disk {overlay.target}: {overlay.path}" for overlay in overlays)
    return (f"monitor: {apart.qmp}", *disks, *apart.notes)
