"""A Varlink client that nobody here wrote."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import varlink

from qsnapd.model.job import Phase
from tests.unit.control_host import GIB, Served


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    with varlink.Client(f"unix:{path}") as client, closing(client.open("io.qsnapd")) as qsnapd:
        yield qsnapd


def information(path: Path) -> dict[str, Any]:
    with varlink.Client(f"unix:{path}") as client:
        client.get_interfaces()
        info: dict[str, Any] = client.info
        return info


async def test_it_introduces_itself(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served:
        info = await trio.to_thread.run_sync(information, served.path)
    assert info["product"] == "qsnapd"
    assert info["interfaces"] == ["org.varlink.service", "io.qsnapd"]


async def test_list(tmp_path: Path) -> None:
    def names(path: Path) -> list[str]:
        with opened(path) as qsnapd:
            return [vm["name"] for vm in qsnapd.ListVms()["vms"]]

    async with Served.at(tmp_path) as served:
        assert await trio.to_thread.run_sync(names, served.path) == ["vm1", "vm2"]


async def test_create_with_progress(tmp_path: Path) -> None:
    def create(path: Path, job_move: Callable[[Phase, int], None]) -> list[dict[str, Any]]:
        replies = []
        with opened(path) as qsnapd:
            request = {"name": "s3", "live": True, "strategy": "background"}
            for reply in qsnapd.CreateSnapshot("vm1", request, _more=True):
                replies.append(reply)
                if len(replies) == 1:
                    trio.from_thread.run_sync(job_move, Phase.SAVING, GIB // 4)
                elif len(replies) == 2:
                    trio.from_thread.run_sync(job_move, Phase.DONE, GIB)
        return replies

    async with Served.at(tmp_path) as served:
        served.host.hurry = False

        def move(phase: Phase, done_bytes: int) -> None:
            assert served.host.running is not None
            served.host.running.move(phase, done_bytes)

        preparing, saving, last = await trio.to_thread.run_sync(create, served.path, move)
    assert preparing["job"]["phase"] == "preparing"
    assert saving["job"]["percent"] == 25.0
    assert last["snapshot"]["name"] == "s3"
    assert last["snapshot"]["image_format"] == "mapped-ram"


async def test_cancel_from_another_connection(tmp_path: Path) -> None:
    def create(path: Path) -> varlink.VarlinkError:
        with opened(path) as qsnapd, opened(path) as other:
            replies = qsnapd.CreateSnapshot("vm1", {}, _more=True)
            assert next(replies)["job"]["phase"] == "preparing"
            other.AbortJob("vm1")
            with pytest.raises(varlink.VarlinkError) as caught:
                next(replies)
        return caught.value

    async with Served.at(tmp_path) as served:
        served.host.hurry = False
        error = await trio.to_thread.run_sync(create, served.path)
    assert error.error() == "io.qsnapd.JobCancelled"
    assert error.parameters()["effect"] == "rolled-back"
