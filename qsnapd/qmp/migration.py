"""Commands as types: saving and loading memory (qapi/migration.json)."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from qsnapd.qmp.commands import Command, Each, QapiStruct, Sentence

_MEASURED_LIMIT = (1 << 63) - 1


def _plausible(number: int) -> int:
    return min(max(number, 0), _MEASURED_LIMIT)


Measured = Annotated[int, AfterValidator(_plausible)]
"""Shown to people, or compared with others: an impossible one is no reason to give up."""


class MigrationStats(QapiStruct):
    """MigrationStats of `query-migrate`."""

    transferred_bytes: Measured = Field(alias="transferred")
    remaining_bytes: Measured = Field(alias="remaining")
    total_bytes: Measured = Field(alias="total")
    zero_pages: Measured = Field(alias="duplicate", default=0)
    normal_pages: Measured = Field(alias="normal", default=0)
    normal_bytes: Measured = 0
    mbit_per_s: Annotated[float, Field(alias="mbps", ge=0, le=1e12)] = 0.0
    dirty_pages_per_s: Measured = Field(alias="dirty-pages-rate", default=0)
    page_size_bytes: Measured = Field(alias="page-size", default=4096)

    @property
    def saved_pages(self) -> int:
        """Pages dealt with so far; beyond zero, QEMU has captured the device state."""
        return self.zero_pages + self.normal_pages


class MigrationInfo(QapiStruct):
    """MigrationInfo of `query-migrate`; no status if this QEMU never migrated."""

    status: str | None = None
    ram: MigrationStats | None = None
    error_desc: Sentence | None = None
    blocked_reasons: Each[tuple[Sentence, ...]] = ()
    total_time_ms: Measured | None = Field(alias="total-time", default=None)
    downtime_reported_ms: Measured | None = Field(alias="downtime", default=None)

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
    reply = Each[list[CapabilityStatus]]


class MigrateSetCapabilities(Command[None]):
    name = "migrate-set-capabilities"
    capabilities: list[CapabilityStatus]

    @classmethod
    def of(cls, states: Mapping[str, bool]) -> "MigrateSetCapabilities":
        return cls(
            capabilities=[CapabilityStatus(capability=c, state=s) for c, s in states.items()]
        )


Parameter = bool | int | str


def _simple(parameters: dict[str, Any]) -> dict[str, Parameter]:
    return {
        name: value
        for name, value in parameters.items()
        if (isinstance(value, int) and abs(value) < 1 << 64)
        or (isinstance(value, str) and value.isprintable())
    }


class QueryMigrateParameters(Command[dict[str, Parameter]]):
    """Without those that are lists or tables, which qsnapd never changes."""

    name = "query-migrate-parameters"
    reply = Annotated[dict[str, Any], AfterValidator(_simple)]


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
