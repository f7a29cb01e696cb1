"""Will QEMU be allowed what its command line needs? Asked as the user that it runs as."""

import os
from collections.abc import Iterator, Sequence

from qsnapd.errors import Blocked
from qsnapd.model.snapshot import Manifest, Process
from qsnapd.snapshot.restoring.differences import Difference
from qsnapd.snapshot.taking.plan_disks import folder_for_overlays
from qsnapd.vm.access import READ, SEARCH, WRITE, Want, refusals
from qsnapd.vm.argv import Fields, Option
from qsnapd.vm.launch import DELETED
from qsnapd.vm.named_files import NamedFile, Use, named_files

KVM = "/dev/kvm"


def check_access(manifest: Manifest, options: Sequence[Option]) -> list[Difference]:
    """Ask for every file that QEMU will need, as the user it will run as. Blocks."""
    process = manifest.machine.process
    wants = list(_wants(manifest, options))
    answers = refusals(process, [want for want, _ in wants])
    found = [
        Difference(what, "", f"{want.path}: {answer}, asked as user {process.uid}", what != "QEMU")
        for (want, what), answer in zip(wants, answers, strict=True)
        if answer is not None
    ]
    return [*found, *_check_overlays(manifest)]


def _wants(manifest: Manifest, options: Sequence[Option]) -> Iterator[tuple[Want, str]]:
    """What QEMU must be allowed, and what for."""
    process = manifest.machine.process
    yield Want(process.exe.removesuffix(DELETED), READ | SEARCH), "QEMU"
    if needs_kvm(options):
        yield Want(KVM, READ | WRITE), KVM
    for disk in manifest.disks:
        for file in disk.chain:
            yield Want(file.path, READ), f"disk {disk.target}"
    images = {file.path for disk in manifest.disks for file in (*disk.chain, *disk.known_as)}
    for named in named_files(options, _known_cwd(process, options)):
        if named.path not in images:
            yield _want_of(named), f"-{named.option.name}, QEMU {named.use} this"


def _want_of(file: NamedFile) -> Want:
    match file.use:
        case Use.READ:
            return Want(file.path, READ)
        case Use.CONNECT:
            return Want(file.path, WRITE)
        case Use.SEARCH:
            return Want(file.path, SEARCH)
        case Use.KEEP_RAM if os.path.isdir(file.path):
            return Want(file.path, WRITE | SEARCH)
        case Use.WRITE | Use.KEEP_RAM if os.path.lexists(file.path):
            return Want(file.path, WRITE)
        case Use.WRITE | Use.KEEP_RAM | Use.LISTEN:
            return Want(os.path.dirname(file.path), WRITE | SEARCH)


def _known_cwd(process: Process, options: Sequence[Option]) -> str | None:
    moved = process.cwd == "/" and any(option.name == "daemonize" for option in options)
    return None if moved else process.cwd


def needs_kvm(options: Sequence[Option]) -> bool:
    """Whether the command line leaves QEMU no other accelerator."""
    wanted: list[str] = []
    for option in options:
        if option.name == "enable-kvm":
            wanted.append("kvm")
        elif option.name == "accel":
            fields = Fields.parse(option.value or "", first_key="accel")
            wanted.append(str(fields.get("accel")))
        elif option.name in ("machine", "M"):
            fields = Fields.parse(option.value or "", first_key="type")
            wanted += str(fields["accel"]).split(":") if "accel" in fields else ()
    return bool(wanted) and set(wanted) == {"kvm"}


def _check_overlays(manifest: Manifest) -> Iterator[Difference]:
    """Whether overlays can be made, and QEMU can write to them: who owns them is decided here."""
    process = manifest.machine.process
    ours = os.geteuid()
    for disk in manifest.disks:
        try:
            folder = folder_for_overlays(disk)
        except Blocked as exc:
            yield Difference(f"disk {disk.target}", "", str(exc), False)
            continue
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            yield Difference(
                f"disk {disk.target}", "", f"{folder}: qsnapd cannot make an overlay there", False
            )
            continue
        try:
            owner = os.stat(disk.frozen).st_uid if ours == 0 else ours
        except OSError as exc:
            yield Difference(f"disk {disk.target}", "", f"{disk.frozen}: {exc.strerror}", False)
            continue
        user = process.uid if ours == 0 else ours
        if user not in (0, owner):
            yield Difference(
                f"disk {disk.target}",
                "",
                f"{disk.frozen} belongs to user {owner}, and so will its overlay; QEMU runs as "
                f"user {user}, and could not write to that",
                True,
            )
