"""The configuration file: TOML in, one frozen `Config` out, or an error that names the key."""

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from qsnapd.errors import ConfigError
from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName

SOCKET_PATH_LIMIT_BYTES = 107
"""Linux allows no more."""


def _plain(words: str) -> str:
    if "\0" in words:
        raise ValueError(f"{words!r} holds a character that ends words and names for the kernel")
    return words


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path")
    _plain(str(path))
    return path


def _fitting(path: Path) -> Path:
    too_long = len(os.fsencode(path)) - SOCKET_PATH_LIMIT_BYTES
    if too_long > 0:
        raise ValueError(f"{str(path)!r} is {too_long} bytes longer than a socket's path may be")
    return path


Words = Annotated[str, AfterValidator(_plain)]
HostPath = Annotated[Path, AfterValidator(_absolute)]
SocketPath = Annotated[HostPath, AfterValidator(_fitting)]
UnitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*\.service$")]


class DaemonConfig(Frozen):
    """Section `[daemon]`."""

    socket: SocketPath = Path("/run/qsnapd/io.qsnapd")
    """Where clients connect; under socket activation systemd decides instead."""
    state_dir: HostPath = Path("/var/lib/qsnapd")
    """Snapshots and the journal: must survive a reboot."""
    runtime_dir: HostPath = Path("/run/qsnapd")
    """What is worth nothing after a reboot; the socket lies there unless `socket` says more."""
    pending_dir: HostPath = Path("/var/lib/qsnapd-pending")
    """What `qsnapd exec` reads; lies beside `state_dir` unless it says more. It is apart from
    that because the users that QEMUs run as have to get there."""
    qemu_img: Words = Field(default="qemu-img", min_length=1)
    stall_limit_s: PositiveFloat = 60.0
    """How long a job may come no further until it is given up, and undone."""
    low_water_bytes: NonNegativeInt = 64 << 20
    """So much stays free on each file system that a snapshot is written to."""
    quota_bytes: PositiveInt | None = None
    """What the snapshots of all VMs may occupy."""
    saves_at_once: PositiveInt = 4
    """How many VMs may save their memory at the same time; others wait."""
    bandwidth_bytes_per_s: PositiveInt | None = None
    """What all saves together may write, where QEMU keeps to it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    operator_group: Words | None = None
    """Members may suspend, resume, checkpoint and revert, but not choose file names."""
    reader_group: Words | None = None
    """Members may look and listen."""

    @model_validator(mode="before")
    @classmethod
    def _implied_paths(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        implied = {}
        if "runtime_dir" in given:
            implied["socket"] = f"{given['runtime_dir']}/io.qsnapd"
        if "state_dir" in given:
            implied["pending_dir"] = f"{str(given['state_dir']).rstrip('/')}-pending"
        return implied | given


class VmConfig(Frozen):
    """Section `[vm.NAME]`."""

    qmp: SocketPath
    """The QMP socket, for qsnapd alone: QEMU serves one client per monitor."""
    agent: SocketPath | None = None
    """The guest agent's socket, for qsnapd alone."""
    freeze_limit_s: PositiveFloat = 60.0
    """How long the agent may take to freeze, and the file systems stay frozen."""
    hook: Annotated[tuple[Words, ...], Field(min_length=1)] | None = None
    """Program and arguments, run as the daemon while the guest is held for manual disks."""
    hold_limit_s: PositiveFloat = 60.0
    """How long the guest may be held for that."""
    quota_bytes: PositiveInt | None = None
    """What its snapshots may occupy."""
    launcher: Literal["spawn", "systemd-run", "unit", "manual"] = "spawn"
    """Who starts QEMU when the VM is put back to a snapshot."""
    unit: UnitName | None = None
    """launcher = "unit": the VM's own, whose ExecStart= is `qsnapd exec VM -- ...`."""
    properties: tuple[Annotated[Words, Field(pattern=r"^[A-Za-z]+=")], ...] = ()
    """launcher = "systemd-run": of the transient unit."""
    start_limit_s: PositiveFloat | None = None
    """How long a QEMU may take to answer once started: by default 60 s, an hour if manual."""
    instead: dict[Words, Words] = Field(default_factory=dict)
    """What to put in place of options that cannot be repeated; see `vm.descriptors`."""

    @model_validator(mode="after")
    def _unit_is_named(self) -> Self:
        if self.launcher == "unit" and self.unit is None:
            raise ValueError('launcher = "unit" needs unit = "NAME.service"')
        if self.unit is not None and self.launcher != "unit":
            raise ValueError(f'unit is given, but launcher is "{self.launcher}"')
        if self.properties and self.launcher != "systemd-run":
            raise ValueError(f'properties are given, but launcher is "{self.launcher}"')
        return self


class Config(Frozen):
    """Everything the file says, defaults filled in."""

    daemon: DaemonConfig = DaemonConfig()
    vm: dict[VmName, VmConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_vm_per_monitor(self) -> Self:
        owners: dict[Path, str] = {}
        for name, vm in self.vm.items():
            other = owners.setdefault(vm.qmp, name)
            if other != name:
                raise ValueError(f"vm.{other} and vm.{name} share the monitor {vm.qmp}")
        return self

    @model_validator(mode="after")
    def _one_vm_per_agent(self) -> Self:
        owners: dict[Path, str] = {}
        for name, vm in self.vm.items():
            other = owners.setdefault(vm.agent, name) if vm.agent is not None else name
            if other != name:  # the wrong guest would be frozen
                raise ValueError(f"vm.{other} and vm.{name} share the guest agent {vm.agent}")
        return self


def load(path: Path) -> Config:
    """Read the configuration file at *path*.

    Raises:
      ConfigError: it cannot be read, is not TOML, or holds a key or value that makes no
        sense; the message names the file and every offending key.
    """
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration {path}: {exc.strerror}") from exc
    except ValueError as exc:  # bad TOML, or bytes that are not UTF-8
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path} cannot be used: its values are nested too deep") from exc
    try:
        return Config.model_validate(tables)
    except ValidationError as exc:
        complaints = "; ".join(_in_words(error) for error in exc.errors())
        raise ConfigError(f"{path}: {complaints}") from exc


def _in_words(error: ErrorDetails) -> str:
    *section, key = error["loc"] or ("",)
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}" + _instead(str(key), section)
    if error["type"] == "missing":
        return f"{where} is missing"
    reason = error["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def _instead(key: str, section: Iterable[str | int]) -> str:
    """What else could stand there; mistyped keys are the commonest mistake."""
    models: dict[tuple[str | int, ...], type[Frozen]] = {(): Config, ("daemon",): DaemonConfig}
    model = models.get(tuple(section), VmConfig)
    return f" (there is no {key!r}; known: {', '.join(sorted(model.model_fields))})"
