"""systemd's command line, as far as starting QEMUs needs it. Everything here blocks.

Where we are not root, the user's own systemd is meant.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qsnapd.errors import VmError

COMMAND_LIMIT_S = 100.0
"""A little longer than systemd itself waits for a unit by default."""
LOG_LINES = 20


@dataclass(frozen=True)
class UnitState:
    """What systemd says of a unit at one moment."""

    load: str
    active: str
    sub: str
    job: int
    """Nonzero while something is to be done to the unit."""
    result: str
    exit_status: int
    main_pid: int
    exec_start: str
    user: str
    """As the unit file says it; empty if it says nothing, or that systemd is to choose one."""

    @property
    def why(self) -> str:
        """How it ended, if nothing better is known."""
        status = f", exit status {self.exit_status}" if self.exit_status else ""
        return f"{self.active} ({self.result}{status})"


_PROPERTIES = {
    "LoadState": "",
    "ActiveState": "",
    "SubState": "",
    "Job": "0",
    "Result": "",
    "ExecMainStatus": "0",
    "MainPID": "0",
    "ExecStart": "",
    "User": "",
    "DynamicUser": "no",
}


def read_unit(unit: str) -> UnitState:
    """Ask for the state of *unit*; one that does not exist is "not-found". Raises: VmError."""
    asked = ",".join(_PROPERTIES)
    lines = systemctl("show", f"--property={asked}", "--", unit).splitlines()
    said = _PROPERTIES | dict(line.split("=", 1) for line in lines if "=" in line)
    return UnitState(
        load=said["LoadState"],
        active=said["ActiveState"],
        sub=said["SubState"],
        job=int(said["Job"] or 0),
        result=said["Result"],
        exit_status=int(said["ExecMainStatus"] or 0),
        main_pid=int(said["MainPID"] or 0),
        exec_start=said["ExecStart"],
        user="" if said["DynamicUser"] == "yes" else said["User"],
    )


def systemctl(*words: str) -> str:
    """Run `systemctl` and return what it printed. Raises: VmError: with its complaint."""
    return run(["systemctl", *_whose(), *words])


def systemd_run(*words: str) -> None:
    """Run `systemd-run`; the unit is up on return. Raises: VmError: with its complaint."""
    run(["systemd-run", *_whose(), *words])


def last_words(unit: str, since: float) -> str:
    """What the processes of *unit* wrote since then (Unix time); empty if that is not known."""
    field = "_SYSTEMD_UNIT" if os.geteuid() == 0 else "_SYSTEMD_USER_UNIT"
    chosen = [f"--since=@{since:.6f}", f"--lines={LOG_LINES}", f"{field}={unit}"]
    try:
        if os.geteuid() == 0:
            run(["journalctl", "--sync"])
        return run(["journalctl", "--output=cat", "--quiet", "--no-pager", *chosen]).strip()
    except VmError:
        return ""


def now() -> float:
    """For `last_words`."""
    return time.time()


def run(argv: Sequence[str]) -> str:
    """Run a program of systemd's and return what it printed.

    Raises: VmError: it is not there, failed, or took too long; with its complaint.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
    except OSError as exc:
        raise VmError(f"cannot run {argv[0]}: {exc.strerror}") from exc
    except subprocess.TimeoutExpired as exc:
        raise VmError(f"{argv[0]} did not answer within {COMMAND_LIMIT_S:g} s") from exc
    if done.returncode:
        said = done.stderr.strip().replace("\n", " ")
        raise VmError(f"{argv[0]}: {said or f'exit status {done.returncode}'}")
    return done.stdout


def _whose() -> list[str]:
    return ["--system" if os.geteuid() == 0 else "--user"]
