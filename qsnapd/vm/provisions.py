"""What the host has around one VM that a snapshot may need, as its administrator says."""

from dataclasses import dataclass

from qsnapd.errors import AgentAbsent
from qsnapd.qmp.agent import GuestAgent


@dataclass(frozen=True)
class Provisions:
    """Of one VM; the limits hold whether or not there is something they apply to."""

    agent: GuestAgent | None = None
    """The agent in its guest; the same object for all who use it."""
    freeze_limit_s: float = 60.0
    """How long the agent may take to freeze, and the file systems stay frozen."""
    hook: tuple[str, ...] = ()
    """Program and arguments to run while the guest is held for manual disks."""
    hold_limit_s: float = 60.0
    """How long it may be held."""
    quota_bytes: int | None = None
    """What its snapshots may occupy."""

    def require_agent(self, vm: str) -> GuestAgent:
        """The agent of *vm*, whose provisions these are. Raises: AgentAbsent: it has none."""
        if self.agent is None:
            raise AgentAbsent(
                f"no guest agent is configured for VM {vm}: give QEMU a port for one, and its "
                f'socket in the configuration, [vm.{vm}] agent = "/path"'
            )
        return self.agent


NO_PROVISIONS = Provisions()
