"""Debian packages without installing them: a private apt that unpacks into a folder.

It asks the machine's own apt configuration where Debian's archive is and with what to
reach it, but keeps lists and downloads in a folder of its own, so that it needs no root
and changes nothing of the system.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

RELEASE = "bookworm"
BACKPORTS = f"{RELEASE}-backports"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DPKG_STATUS = Path("/var/lib/dpkg/status")

TARGET_FORMAT = "$(RELEASE) $(COMPONENT) $(REPO_URI) $(ORIGIN)"
"""What we want to know of each of apt's sources, for `apt-get indextargets`."""


class CannotFetch(Exception):
    """A package cannot be had; the message says why."""


class PrivateApt:
    """An apt of our own in *folder*, for Debian's release and its backports.

    The folder is this object's own: it is created, and `close` removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("state/lists/partial", "cache"):
            (folder / name).mkdir(parents=True)
        # apt locks the folder of the status file, so it has to be a copy
        shutil.copy(DPKG_STATUS, folder / "state" / "status")
        self._options = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "state" / "status",
            "Dir::Cache": folder / "cache",
            "Acquire::Languages": "none",
            # as root, apt would download as a user who may not write here
            "APT::Sandbox::User": "root",
        }
        sources = folder / "sources.list"
        sources.write_text(self._sources())
        self._options |= {"Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "-"}
        self._run("apt-get", "--quiet=2", "update")

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def unpack_with_dependencies(
        self, packages: Sequence[str], into: Path, *, backports: bool = False
    ) -> None:
        """Unpack *packages*, and whatever they need that is not installed here."""
        debs = self._folder / "debs"
        (debs / "partial").mkdir(parents=True)
        self._run(
            *("apt-get", "--quiet=2", "--yes", "-o", f"Dir::Cache::archives={debs}"),
            *("install", "--download-only", "--reinstall", "--no-install-recommends"),
            *(("--target-release", BACKPORTS) if backports else ()),
            *packages,
        )
        self._unpack_all(debs, into)

    def unpack_alone(self, packages: Sequence[str], into: Path) -> None:
        """Unpack *packages* of the release, but none of their dependencies."""
        debs = self._folder / "debs"
        debs.mkdir()
        self._run("apt-get", "--quiet=2", "download", *packages, cwd=debs)
        self._unpack_all(debs, into)

    def dependencies(self, package: str) -> list[str]:
        """Return the names of the packages that *package* depends on, directly."""
        answer = self._run("apt-cache", "depends", package)
        return re.findall(r"^\s*Depends: ([\w.+-]+)", answer, re.MULTILINE)

    def _sources(self) -> str:
        """Return this machine's own sources of Debian's release, and its backports with them."""
        ask = ("apt-get", "indextargets", f"--format={TARGET_FORMAT}")
        uris = _debian_uris(run(*ask))
        if RELEASE not in uris:  # the system's lists may be missing: fetch our own
            self._run("apt-get", "--quiet=2", "update")
            uris = _debian_uris(self._run(*ask))
        if RELEASE not in uris:
            raise CannotFetch(
                f"apt on this machine has no source for Debian {RELEASE} (main): "
                "the parts for the tests come from there"
            )
        uris[BACKPORTS] = uris[RELEASE]
        signed_by = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        return "".join(f"deb {signed_by}{uri} {suite} main\n" for suite, uri in uris.items())

    def _unpack_all(self, debs: Path, into: Path) -> None:
        into.mkdir(parents=True, exist_ok=True)
        for deb in sorted(debs.glob("*.deb")):
            run("dpkg-deb", "--extract", str(deb), str(into))
        shutil.rmtree(debs)

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        settings = [f"-o{name}={value}" for name, value in self._options.items()]
        return run(program, *settings, *arguments, cwd=cwd)


def multiarch() -> str:
    """Return the name of the folder Debian keeps this machine's libraries in."""
    return f"{platform.machine()}-linux-gnu"


def run(*argv: str, cwd: Path | None = None) -> str:
    """Run a program and return what it printed.

    Raises:
      CannotFetch: it failed; the message has its last words.
    """
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotFetch(f"{argv[0]} failed ({' '.join(argv)}):\n{done.stderr[-2000:]}")
    return done.stdout


def _debian_uris(targets: str) -> dict[str, str]:
    """Return the addresses of Debian's suites of RELEASE, from lines of TARGET_FORMAT."""
    uris: dict[str, str] = {}
    for line in targets.splitlines():
        suite, component, uri, origin = line.split(maxsplit=3)
        if origin == "Debian" and component == "main" and suite.split("-")[0] == RELEASE:
            uris[suite] = uri
    return uris
