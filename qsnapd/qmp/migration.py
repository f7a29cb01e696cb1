"""Commands as types: saving and loading memory (qapi/migration.json)."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from qsnapd.qmp.commands import Command, QapiStruct


class MigrationStats(QapiStruct):
    """MigrationStats of `query-migrate`."""

    transferred_bytes: int = Field(alias="transferred")
    remaining_bytes: int = Field(alias="remaining")
    total_bytes: int = Field(alias="total")
    zero_pages: int = Field(alias="duplicate", default=0)
    normal_pages: int = Field(alias="normal", default=0)
    normal_bytes: int = 0
    mbit_per_s: float = Field(alias="mbps", default=0.0)
    dirty_pages_per_s: int = Field(alias="dirty-pages-rate", default=0)
    page_size_bytes: int = Field(alias="page-size", default=4096)

    @property
    def saved_pages(self) -> int:
        """Pages dealt with so far; beyond zero, QEMU has captured the device state."""
        return self.zero_pages + self.normal_pages


class MigrationInfo(QapiStruct):
    """MigrationInfo of `query-migrate`; no status if this QEMU never migrated."""

    status: str | None = None
    ram: MigrationStats | None = None
    error_desc: str | None = None
    blocked_reasons: tuple[str, ...] = ()
    total_time_ms: int | None = Field(alias="total-time", default=None)
    downtime_reported_ms: int | None = Field(alias="downtime", default=None)

    @property
    def active(self) -> bool:
        """A migration is under way, in whatever stage."""
        return self.status not in (None, "none", "completed", "failed", "cancelled")


class QueryMigrate(Command[MigrationInfo]):
    name = "query-migrate"
    reply = MigrationInfo


class QueryIncoming(QueryMigrate):
    """The same of a QEMU that loads: QEMU 10.0 answers nothing until a mapped-ram is in."""

    timeout_s = 3600.0


class CapabilityStatus(QapiStruct):
    capability: str
    state: bool


class QueryMigrateCapabilities(Command[list[CapabilityStatus]]):
    name = "query-migrate-capabilities"
    reply = list[CapabilityStatus]


class MigrateSetCapabilities(Command[None]):
    name = "migrate-set-capabilities"
    capabilities: list[CapabilityStatus]

    @classmethod
    def of(cls, states: Mapping[str, bool]) -> "MigrateSetCapabilities":
        return cls(
            capabilities=[CapabilityStatus(capability=c, state=s) for c, s in states.items()]
        )


class QueryMigrateParameters(Command[dict[str, Any]]):
    name = "query-migrate-parameters"
    reply = dict[str, Any]


class MigrateSetParameters(Command[None]):
    """MigrateSetParameters, only the members given here are changed."""

    name = "migrate-set-parameters"
    parameters: dict[str, Any]

    def arguments(self) -> dict[str, object]:
        return dict(self.parameters)


class Migrate(Command[None]):
    """migrate: returns once the migration has begun, not when it has ended."""

    name = "migrate"
    timeout_s = 60.0
    uri: str


class MigrateCancel(Command[None]):
    name = "migrate_cancel"
    timeout_s = 30.0


class MigrateContinue(Command[None]):
    name = "migrate-continue"
    state: str = "pre-switchover"


class MigrateIncoming(Command[None]):
    name = "migrate-incoming"
    timeout_s = 60.0
    uri: str
