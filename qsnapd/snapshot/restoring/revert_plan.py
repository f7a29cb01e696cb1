"""What a revert will do, and every reason not to: found before the running VM is touched."""

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qsnapd.errors import Blocked, WrongState
from qsnapd.image.mapped_ram import read_layout
from qsnapd.model.launch import LaunchInfo, NewOverlay
from qsnapd.model.plan import Launch, Loading, OverlayPlan, Restore, RevertPlan
from qsnapd.model.request import Memory, RestoreRequest, RevertRequest
from qsnapd.model.snapshot import DiskLayer, ImageFormat, Manifest
from qsnapd.snapshot.taking.plan_disks import AFTER, folder_for_overlays, image_stem
from qsnapd.vm.apart_seen import renew_generation_id
from qsnapd.vm.identity import key_of
from qsnapd.vm.kept_ram import kept_ram_files, require_emptiable
from qsnapd.vm.launch import (
    NOBODY,
    CommandLine,
    MovedDisk,
    Parent,
    Start,
    launch_of,
    read_command_line,
)
from qsnapd.vm.ram_options import CannotMap, map_ram
from qsnapd.vm.readable import require_readable

VIEW_SUFFIX = ".view"


@dataclass(frozen=True)
class HowStarted:
    """How a snapshot's QEMU is started: the parts of a plan that hang together."""

    launch: Launch
    loading: Loading | None
    lazy_refusal: str | None


def plan_revert(
    manifest: Manifest,
    request: RevertRequest,
    *,
    was_running: bool,
    directory: Path,
    parent: Parent,
    loads_lazily: bool = False,
) -> RevertPlan:
    """Name the new overlays and compute the command line; reads file identities. Blocks.

    *directory*: where temporary files of the VM go. *loads_lazily*: QEMU pages in an image
    by itself.
    Raises: Blocked, WrongState: the recorded command line cannot be used again, and why.
    """
    token = secrets.token_hex(4)
    overlays = tuple(plan_overlay(disk, manifest.name, token) for disk in manifest.disks)
    starts = manifest.memory is not None or request.state is not None
    line = read_manifest_line(manifest, [o.path for o in overlays], parent)
    line = line.changed(renew_generation_id(line.options))
    started = plan_start(
        *(manifest, request, line, token, directory), starts=starts, loads_lazily=loads_lazily
    )
    return RevertPlan(
        token=token,
        vm=manifest.vm,
        name=manifest.name,
        requested_at=datetime.now(UTC),
        to_running=(request.state or manifest.state) == "running",
        launch=started.launch,
        loading=started.loading,
        lazy_refusal=started.lazy_refusal,
        overlays=overlays,
        was_running=was_running,
        starts=starts,
    )


def plan_return(kept: Manifest, parent: Parent, *, to_running: bool) -> Restore:
    """How the state that was just kept comes back: on the overlays made when it was kept.

    Nobody has written to these, because the guest has not run since. Blocks.
    Raises: Blocked, WrongState: its command line cannot be used again, and why.
    """
    token = secrets.token_hex(4)
    images = [disk.overlay or disk.frozen for disk in kept.disks]
    line = read_manifest_line(kept, images, parent)
    request = RestoreRequest(name=kept.name, memory=Memory.EAGER)
    started = plan_start(kept, request, line, token, Path("/"), starts=True)
    return Restore(
        token=token,
        vm=kept.vm,
        name=kept.name,
        requested_at=datetime.now(UTC),
        to_running=to_running,
        launch=started.launch,
        loading=started.loading,
        overlays=(),
    )


def describe_launch(
    manifest: Manifest, request: RevertRequest, parent: Parent
) -> LaunchInfo:
    """Say how a revert would start QEMU, reading all memory; touches nothing. Blocks.

    Raises: Blocked: it cannot be started again, and why.
    """
    plan = plan_revert(
        manifest,
        request.model_copy(update={"memory": Memory.EAGER}),
        was_running=False,
        directory=Path("/"),
        parent=parent,
    )
    launch = plan.launch
    return LaunchInfo(
        vm=plan.vm,
        snapshot=plan.name,
        executable=launch.executable,
        argv=launch.argv,
        command_line=launch.command_line,
        cwd=launch.cwd,
        uid=launch.uid,
        gid=launch.gid,
        environment=dict(launch.environment),
        overlays=tuple(
            NewOverlay(
                target=overlay.target,
                path=overlay.path,
                backing=overlay.backing,
                backing_format=overlay.backing_format,
            )
            for overlay in plan.overlays
        ),
        loading=plan.loading,
    )


def read_manifest_line(
    manifest: Manifest, images: Sequence[str], parent: Parent = NOBODY
) -> CommandLine:
    """The recorded command line with each disk on the image given for it. Raises: Blocked.

    Disks that the snapshot leaves out are on the images that they were on.
    """
    disks = [
        MovedDisk(target=disk.target, chain=(*disk.chain, *disk.known_as), overlay=image)
        for disk, image in zip(manifest.disks, images, strict=True)
    ]
    disks += [
        MovedDisk(disk.target, (*disk.chain, *disk.known_as), disk.frozen, stays=True)
        for disk in manifest.left_out
    ]
    machine = manifest.machine
    return read_command_line(machine.process, machine, disks, identify=key_of, parent=parent)


def plan_start(
    manifest: Manifest,
    request: RestoreRequest,
    line: CommandLine,
    token: str,
    directory: Path,
    *,
    starts: bool,
    loads_lazily: bool = False,
) -> HowStarted:
    """Decide how the memory gets in: paged in by QEMU, else mapped, else read. Blocks.

    *starts*: False: it will be started by somebody else, some time, and boots then.
    *loads_lazily*: this QEMU can page in a mapped-ram image by itself (after 11.1).
    Raises: Blocked: it was to be mapped, and cannot be; or the program is gone.
    """
    process = manifest.machine.process

    def launch(line: CommandLine, start: Start, plain: CommandLine | None = None) -> Launch:
        return launch_of(process, line, start=start, token=token, identify=key_of, plain=plain)

    memory, image_format = manifest.memory, manifest.image_format
    if memory is None or image_format is None:
        return HowStarted(launch(line, Start.HALTED if starts else Start.BOOT), None, None)
    kept = kept_ram_files(line.options, line.cwd) if image_format is ImageFormat.MAPPED_RAM else []
    for path in kept:
        require_emptiable(path, process.uid)
    eager = Loading(memory_file=memory.path, image_format=image_format, emptied=tuple(kept))
    if request.memory is Memory.EAGER:
        return HowStarted(launch(line, Start.LOAD), eager, None)
    if loads_lazily and image_format is ImageFormat.MAPPED_RAM:
        on_demand = eager.model_copy(update={"on_demand": True})
        return HowStarted(launch(line, Start.LOAD), on_demand, None)
    try:
        mapped, blocks = _map(manifest, memory.path, line)
    except CannotMap as exc:
        if request.memory is Memory.LAZY:
            raise Blocked(f"snapshot {manifest.name} cannot be restored lazily: {exc}") from None
        return HowStarted(launch(line, Start.LOAD), eager, str(exc))
    lazy = eager.model_copy(
        update={"emptied": (), "view": str(directory / f".{token}{VIEW_SUFFIX}"), "mapped": blocks}
    )
    return HowStarted(launch(mapped, Start.LOAD, plain=line), lazy, None)


def _map(
    manifest: Manifest, image: str, line: CommandLine
) -> tuple[CommandLine, tuple[str, ...]]:
    """Put the mapping of *image* into *line*; returns it with the blocks that are mapped."""
    if not manifest.is_mappable:
        raise CannotMap("its memory image is not one whose holes are zero pages (mapped-ram)")
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise CannotMap(f"{image} cannot be opened: {exc.strerror}") from exc
    try:
        layout = read_layout(descriptor)
    finally:
        os.close(descriptor)
    require_readable(image, manifest.machine.process)
    found = map_ram(line.options, image, layout, manifest.machine)
    return line.changed(found.options), tuple(found.blocks)


def plan_overlay(disk: DiskLayer, snapshot: str, token: str) -> OverlayPlan:
    """The overlay that a restored QEMU writes to, beside the frozen image."""
    name = f"{image_stem(Path(disk.frozen))}{AFTER}{snapshot}.{disk.target}-{token}.qcow2"
    return overlay_at(folder_for_overlays(disk) / name, disk)


def overlay_at(path: Path, disk: DiskLayer) -> OverlayPlan:
    """An overlay over a snapshot's frozen image."""
    return OverlayPlan(
        target=disk.target,
        path=str(path),
        partial=str(path.with_name(f"{path.name}.partial")),
        backing=disk.frozen,
        backing_format=disk.frozen_format,
        virtual_size_bytes=disk.virtual_size_bytes,
    )


def require_no_qemu(name: str, qmp: Path) -> None:
    """Refuse to start a second QEMU beside one that runs but is not attached.

    Raises: WrongState: somebody serves the monitor.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(qmp))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError:
            pass  # e.g. a full queue of clients: somebody does
    raise WrongState(
        f"VM {name}: a QEMU serves {qmp}, but qsnapd is not attached to it (another client may "
        "hold the monitor): it cannot be ended, and no second one is started beside it"
    )
