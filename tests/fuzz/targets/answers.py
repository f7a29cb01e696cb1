"""What QEMU says when it is asked: types, sizes and names that make no sense.

Of `answers` an input is a JSON object, by command what is returned; an object with "error" in it
is a refusal. Of `checkpoint` it is noise, which says which answers are spoiled on the way of a
whole checkpoint, and how: the fake QEMU does what it is told, and lies about it.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import trio
import trio.testing

from qsnapd.errors import CommandRefused, QsnapError, VmError
from qsnapd.model.plan import JournalEntry
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Machine, Process, Strategy
from qsnapd.qmp.block import QueryJobs
from qsnapd.qmp.chardev import QueryChardev
from qsnapd.qmp.migration import QueryMigrate
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import EventListener
from qsnapd.snapshot.checking.live import look_live
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.taking.saving import progress_of
from qsnapd.snapshot.taking.situation import look
from qsnapd.vm.attached import AttachedVm, learn
from qsnapd.vm.disks import read_disks
from qsnapd.vm.identity import identify
from qsnapd.vm.live_chain import read_live
from qsnapd.vm.tracker import Tracker
from tests.faults.scene import Case, Scene, open_scene
from tests.faults.sweeps import RUN_LIMIT_S
from tests.fuzz.mutating import is_text, spoil_json, spoil_tree
from tests.fuzz.targets.target import Feed, Target, in_this_thread, plain

_PROCESS = Process(exe="/bin/sh", argv=("qemu",), cwd="/", uid=0, gid=0)


class _Liar:
    """A QEMU that has one answer to each command, whatever it is."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self._answers = answers

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object],
        *,
        timeout_s: float,
        descriptor: int | None = None,
    ) -> object:
        await trio.lowlevel.checkpoint()
        key = f"{name} {arguments['property']}" if "property" in arguments else name
        answer = self._answers.get(key, {"error": "not found"})
        if isinstance(answer, dict) and "error" in answer:
            raise CommandRefused(name, "GenericError", str(answer["error"]))
        return answer

    def listen(self, listener: EventListener) -> None: ...

    def unlisten(self, listener: EventListener) -> None: ...


def feed_answers(data: bytes) -> None:
    try:
        answers = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(answers, dict) and is_text(answers):  # else the bridge has refused it
        trio.run(_ask, answers)


async def _ask(answers: Mapping[str, object]) -> None:
    session, tracker = QmpSession(_Liar(answers)), Tracker(lambda old, new: None)
    identity = identify(os.getpid())
    try:
        vm = await learn("vm1", session, tracker, identity, _PROCESS)
    except VmError:
        vm = None
    if vm is not None:
        await _ask_of(vm)
    for ask in (_disks, _chains, _progress, _devices):
        with suppress(VmError):
            await ask(session)


async def _ask_of(vm: AttachedVm) -> None:
    assert Machine.model_validate_json(vm.machine().model_dump_json()) == vm.machine()
    with suppress(VmError):
        knowing = await vm.with_cpu()
        assert Machine.model_validate_json(knowing.machine().model_dump_json())
    with suppress(QsnapError):
        situation = await look(vm, snapshots=frozenset(), current=None, directory=Path("/s"))
        plan = plan_checkpoint(CreateRequest(name="s1"), situation)
        entry = JournalEntry(plan=plan, pid=1, start_time_ticks=1)
        assert JournalEntry.model_validate_json(entry.model_dump_json()) == entry


async def _disks(session: QmpSession) -> None:
    for disk in await read_disks(session, os.getpid()):
        info = disk.info()
        assert type(info).model_validate_json(info.model_dump_json()) == info
        assert disk.target
        assert "/" not in disk.target
        assert disk.answers_to(disk.target)


async def _chains(session: QmpSession) -> None:
    await read_live(session, os.getpid())
    await look_live(session, os.getpid())


async def _progress(session: QmpSession) -> None:
    info = await session.execute(QueryMigrate())
    progress = progress_of(info)
    assert progress.done_bytes <= progress.total_bytes
    assert isinstance(info.active, bool)
    assert len(info.error_desc or "") < 10_000


async def _devices(session: QmpSession) -> None:
    for device in await session.execute(QueryChardev()):
        device.is_at(Path("/agent"))
        assert isinstance(device.is_taken, bool)
    for job in await session.execute(QueryJobs()):
        assert job.done_bytes >= 0


def _answers() -> list[bytes]:
    image = {
        "filename": "/d/top.qcow2",
        "format": "qcow2",
        "virtual-size": 1 << 30,
        "actual-size": 4096,
        "cluster-size": 65536,
        "format-specific": {"type": "qcow2", "data": {"extended-l2": False, "compat": "1.1"}},
        "backing-image": {"filename": "/d/base.raw", "format": "raw", "virtual-size": 1 << 30},
    }
    node = {
        "node-name": "disk0",
        "file": "/d/top.qcow2",
        "drv": "qcow2",
        "ro": False,
        "image": image,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "detect_zeroes": "off",
        "active": True,
        "dirty-bitmaps": [{"name": "b0", "granularity": 65536, "busy": False, "persistent": True}],
    }
    stats = {"node-name": "disk0", "parent": {"node-name": "f0"}, "backing": {"node-name": "b"}}
    ram = {"transferred": 5, "remaining": 3, "total": 8, "mbps": 2.5, "duplicate": 1, "normal": 2}
    features = [{"cpuid-register": "EAX", "cpuid-input-eax": 1, "features": 0}]
    answers = {
        "query-commands": [{"name": "query-status"}, {"name": "blockdev-set-active"}],
        "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 0},
        "qom-get type": "pc-q35-10.0-machine",
        "qom-get share-rw": False,
        "qom-get filtered-features": features,
        "query-cpus-fast": [{"cpu-index": 0, "qom-path": "/machine/unattached/device[0]"}],
        "query-cpu-model-expansion": {"model": {"name": "qemu64", "props": {"sse2": True}}},
        "query-version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "Debian"},
        "query-uuid": {"UUID": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"},
        "query-memdev": [{"id": "pc.ram", "size": 1 << 30}],
        "query-block": [{"device": "", "qdev": "/machine/peripheral/d", "inserted": node}],
        "query-named-block-nodes": [node],
        "query-blockstats": [stats],
        "query-fdsets": [{"fdset-id": 1, "fds": [{"fd": 5, "opaque": "/d/x.qcow2"}]}],
        "query-status": {"status": "running", "running": True},
        "query-migrate": {"status": "active", "ram": ram, "blocked-reasons": ["a device"]},
        "query-migrate-capabilities": [{"capability": "mapped-ram", "state": False}],
        "query-migrate-parameters": {"max-bandwidth": 5, "tls-creds": "", "mode": "normal"},
        "query-jobs": [{"id": "j", "type": "commit", "status": "ready", "current-progress": 1}],
        "query-chardev": [
            {"label": "c", "filename": "disconnected:unix:/agent,server=on", "frontend-open": True}
        ],
    }
    return [json.dumps(answers).encode()]


# --- a whole checkpoint ----------------------------------------------------------------------


@contextmanager
def _open_checkpoint() -> Iterator[Feed]:
    with in_this_thread():

        def feed(data: bytes) -> None:
            clock = trio.testing.MockClock(autojump_threshold=0)
            trio.run(partial(_take_one, Random(data)), clock=clock)

        yield feed


async def _take_one(random: Random) -> None:
    strategy = random.choice((*Strategy, None))
    async with open_scene(Case(random.choice(("7.2.22", "10.0.2")), strategy)) as scene:
        _spoil_answers(scene, random)
        with trio.fail_after(RUN_LIMIT_S), suppress(QsnapError):
            await scene.attach()
        _spoil_answers(scene, random)
        with trio.fail_after(RUN_LIMIT_S), suppress(QsnapError):
            manifest = await scene.take_one()
            assert scene.store.manifest(manifest.name) == manifest


def _spoil_answers(scene: Scene, random: Random) -> None:
    """Let some of the answers that come from now on be others."""
    wrong = {random.randrange(60) for _ in range(random.randrange(1, 4))}
    numbers = itertools.count()

    def lie(result: object) -> object:
        if next(numbers) not in wrong:
            return result
        spoilt = spoil_tree(json.loads(json.dumps(result)), random)
        return spoilt if is_text(spoilt) else result

    scene.qemu.monitor.lies = lie


def _noise() -> list[bytes]:
    return [bytes([number]) for number in range(20)]


TARGETS = (
    Target("answers", plain(feed_answers), _answers, spoil_json, runs_long=60_000),
    Target("checkpoint", _open_checkpoint, _noise, runs_long=3_000, runs_short=50),
)
