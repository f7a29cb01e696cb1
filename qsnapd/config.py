"""The configuration file: TOML in, one frozen `Config` out, or an error that names the key."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qsnapd.errors import ConfigError
from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path")
    return path


HostPath = Annotated[Path, AfterValidator(_absolute)]


class DaemonConfig(Frozen):
    """Section `[daemon]`."""

    socket: HostPath = Path("/run/qsnapd/io.qsnapd")
    """Where clients connect; under socket activation systemd decides instead."""
    state_dir: HostPath = Path("/var/lib/qsnapd")
    """Snapshots and the journal: must survive a reboot."""
    runtime_dir: HostPath = Path("/run/qsnapd")
    """What is worth nothing after a reboot; the socket lies there unless `socket` says more."""
    qemu_img: str = Field(default="qemu-img", min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    operator_group: str | None = None
    """Members may suspend, resume, checkpoint and revert, but not choose file names."""
    reader_group: str | None = None
    """Members may look and listen."""


    @model_validator(mode="before")
    @classmethod
    def _socket_in_runtime_dir(cls, given: object) -> object:
        if isinstance(given, dict) and "runtime_dir" in given and "socket" not in given:
            return {**given, "socket": f"{given['runtime_dir']}/io.qsnapd"}
        return given


class VmConfig(Frozen):
    """Section `[vm.NAME]`."""

    qmp: HostPath
    """The QMP socket, for qsnapd alone: QEMU serves one client per monitor."""
    agent: HostPath | None = None
    """The guest agent's socket."""


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
