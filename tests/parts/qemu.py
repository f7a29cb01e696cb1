"""Unpack a QEMU under .cache so that it runs by plain path, as an installed one does.

An unpacked QEMU has to be told two things. Where its firmware and modules are: it looks
for a folder "qemu-bundle" beside itself, a root of all the paths it was built with. And
where those libraries are that this machine lacks and that are unpacked with it.
"""

import shutil
from pathlib import Path

from tests.parts import qemu_folder, read_qemu_version
from tests.parts.debian import CannotFetch, PrivateApt, multiarch, run

PROGRAMS = ("qemu-system-x86", "qemu-utils")
FIRMWARE = ("qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu")
"""Named although they are dependencies: an installed one would not lie beside QEMU."""


def unpack_qemu(apt: PrivateApt, version: str, *, backports: bool) -> None:
    """Unpack QEMU, which has to be *version*, and make sure that it runs.

    On failure or when killed: nothing is left under the final name.
    """
    final = qemu_folder(version)
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    apt.unpack_with_dependencies((*PROGRAMS, *FIRMWARE), partial, backports=backports)
    tools = partial.with_suffix(".tools")
    apt.unpack_alone(["patchelf"], tools)
    for name in ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-nbd"):
        _point_at_libraries(tools / "usr/bin/patchelf", partial / "usr/bin" / name)
    shutil.rmtree(tools)
    (partial / "usr/bin/qemu-bundle").symlink_to("../..")
    found = read_qemu_version(partial / "usr/bin/qemu-system-x86_64")
    if found != version:
        raise CannotFetch(f"Debian should have QEMU {version} there, but what came says {found}")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _point_at_libraries(patchelf: Path, program: Path) -> None:
    # DT_RPATH rather than DT_RUNPATH: it also serves the libraries of the libraries
    places = ":".join(f"$ORIGIN/../{up}lib/{multiarch()}" for up in ("", "../"))
    run(str(patchelf), "--force-rpath", "--set-rpath", places, str(program))
