"""Which launcher starts which VM, as the configuration has it."""

from qsnapd.config import Config, VmConfig
from qsnapd.store.pending import Pending
from qsnapd.vm.launcher import PATIENCE_S, Launcher, launcher_of


def launcher_for(name: str, config: Config) -> Launcher:
    """Return the launcher of a VM of the configuration."""
    vm = config.vm[name]
    return launcher_of(
        vm.launcher,
        name,
        unit=vm.unit,
        pending=Pending.of(config.daemon.pending_dir, name),
        patience_s=_patience_s(vm),
        properties=vm.properties,
    )


def launcher_for_clone(source: str, clone: str, config: Config) -> Launcher:
    """Return the launcher of a clone: its source's, but for a unit, which is only that VM's."""
    vm = config.vm[source]
    return launcher_of(
        "systemd-run" if vm.launcher == "unit" else vm.launcher,
        clone,
        unit=None,
        pending=Pending.of(config.daemon.pending_dir, clone),
        patience_s=_patience_s(vm),
        properties=vm.properties,
    )


def _patience_s(vm: VmConfig) -> float:
    return vm.start_limit_s or PATIENCE_S[vm.launcher]
