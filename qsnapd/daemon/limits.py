"""What all jobs of a daemon keep to, as the configuration has it."""

from dataclasses import dataclass, field

from qsnapd.config import DaemonConfig
from qsnapd.patience import STALL_LIMIT_S
from qsnapd.snapshot.taking.room import LOW_WATER_BYTES
from qsnapd.snapshot.taking.saves import Saves


@dataclass(frozen=True)
class Limits:
    """The same object for all VMs."""

    stall_limit_s: float = STALL_LIMIT_S
    low_water_bytes: int = LOW_WATER_BYTES
    quota_bytes: int | None = None
    """Of all VMs together."""
    saves: Saves = field(default_factory=Saves)

    @classmethod
    def of(cls, settings: DaemonConfig) -> "Limits":
        return cls(
            stall_limit_s=settings.stall_limit_s,
            low_water_bytes=settings.low_water_bytes,
            quota_bytes=settings.quota_bytes,
            saves=Saves(settings.saves_at_once, settings.bandwidth_bytes_per_s),
        )
