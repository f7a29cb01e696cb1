"""The calls that change what is kept of snapshots, over the socket."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.control.authorization import Role
from qsnapd.control.client import Client
from qsnapd.control.methods import METHODS
from qsnapd.errors import BadRequest, SnapshotExists, UnknownSnapshot
from tests.unit.control_host import Served, manifest


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def call(served: Served, method: str, **parameters: object) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        with Client(served.path) as client:
            snapshot: dict[str, Any] = client.call(method, vm="vm1", **parameters)["snapshot"]
            return snapshot

    return await trio.to_thread.run_sync(ask)


async def test_what_they_do_and_say(served: Served) -> None:
    told = await call(served, "SetCurrentSnapshot", name="s1")
    assert (told["name"], told["current"]) == ("s1", True)
    told = await call(served, "CopySnapshot", name="s2", new_name="copy")
    assert (told["name"], told["parent"]) == ("copy", "s1")
    told = await call(served, "RenameSnapshot", name="s2", new_name="r2")
    assert told["name"] == "r2"
    assert sorted(served.host.manifests) == ["copy", "r2", "s1"]
    disk_only = manifest("s9", "s1").model_copy(
        update={"memory": None, "strategy": None, "image_format": None}
    )
    told = await call(served, "RedefineSnapshot", manifest=disk_only.model_dump_json())
    assert (told["name"], told["memory"], told["current"]) == ("s9", None, False)
    assert served.host.manifests["s9"] == disk_only
    await call(served, "RedefineSnapshot", manifest=disk_only.model_dump_json(), current=True)
    assert served.host.current_name == "s9"


async def test_refusals(served: Served) -> None:
    for method in ("RenameSnapshot", "CopySnapshot"):
        with pytest.raises(SnapshotExists):
            await call(served, method, name="s1", new_name="s2")
        with pytest.raises(UnknownSnapshot):
            await call(served, method, name="none", new_name="s9")
        with pytest.raises(BadRequest, match="must not contain '/'"):
            await call(served, method, name="s1", new_name="a/b")


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("RedefineSnapshot", Role.ADMIN),
        ("RenameSnapshot", Role.OPERATOR),
        ("CopySnapshot", Role.OPERATOR),
        ("SetCurrentSnapshot", Role.OPERATOR),
    ],
)
def test_who_may(method: str, role: Role) -> None:
    parameters = {"vm": "vm1", "name": "s1", "new_name": "s9", "manifest": "{}"}
    fields = METHODS[method].model_fields
    made = METHODS[method](**{key: parameters[key] for key in fields if key in parameters})
    assert made.needed_role() is role
