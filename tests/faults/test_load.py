"""Loading a memory image: into QEMUs that want it all at once, and into those to come."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from qsnapd.errors import CaptureFailed, TargetRefused
from qsnapd.model.job import JobKind
from qsnapd.model.plan import Loading
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.snapshot.restoring.load import can_load_on_demand, finish_loading, load_memory
from tests.faults.fake_monitor import Arguments, Refusal
from tests.faults.scene import Case, Scene, open_scene

STEP_S = 0.5
ALL_AT_ONCE = ("setup", "active", "completed")
ON_DEMAND = ("setup", "active", "postcopy-active:inmigrate", "postcopy-active", "completed")
BOTH = {"mapped-ram", "postcopy-ram"}


class Incoming:
    """What a QEMU that waits for its memory has in place of a save."""

    def __init__(self, scene: Scene, *, takes_both: bool, stages: Sequence[str] = ()) -> None:
        self.qemu, self.monitor = scene.qemu, scene.qemu.monitor
        self.takes_both = takes_both
        self.stages = stages or (ON_DEMAND if takes_both else ALL_AT_ONCE)
        self.status: str | None = None
        self.loaded_with: set[str] = set()
        self.size_bytes = 0
        migration = self.qemu.migration
        if self.monitor.major >= 10:
            migration.capabilities["postcopy-ram"] = False
        self._set = migration._set_capabilities
        self.monitor.serve("migrate-set-capabilities", self._set_capabilities)
        self.monitor.serve("migrate-incoming", self._load)
        self.monitor.serve("query-migrate", self._query)

    @property
    def capabilities(self) -> set[str]:
        return {name for name, state in self.qemu.migration.capabilities.items() if state}

    def _set_capabilities(self, arguments: Arguments) -> None:
        if self.status not in (None, "completed"):
            raise Refusal("There's a migration process in progress")
        wanted = {c["capability"] for c in arguments["capabilities"] if c["state"]}
        if wanted >= BOTH and not self.takes_both:
            raise Refusal("Mapped-ram migration is incompatible with postcopy")
        self._set(arguments)

    def _load(self, arguments: Arguments) -> None:
        protocol, _, name = arguments["uri"].partition(":")
        if protocol == "fd":
            self.monitor.take_named(name)
        else:
            self.monitor.open_fdset(name, 0)
        self.loaded_with = self.capabilities
        self.status = "setup"
        self.monitor.start(self._run)

    async def _run(self) -> None:
        stages = self.stages
        if not self.loaded_with >= BOTH:
            stages = [stage for stage in stages if not stage.startswith("postcopy")]
        for stage in stages:
            self.status, _, run_state = stage.partition(":")
            if self.status in ("postcopy-active", "completed") and not run_state:
                self.qemu.status = "paused" if self.qemu.status == "inmigrate" else self.qemu.status
            self.monitor.emit("MIGRATION", status=self.status)
            await trio.sleep(STEP_S)

    def _query(self, _arguments: Arguments) -> object:
        failed = {"error-desc": "planted"} if self.status == "failed" else {}
        return {} if self.status is None else {"status": self.status, **failed}


def loading(scene: Scene, **more: object) -> Loading:
    image = scene.folder / "memory.img"
    image.write_bytes(b"x")
    return Loading.model_validate(
        {"memory_file": str(image), "image_format": ImageFormat.MAPPED_RAM, **more}
    )


def waiting(version: str) -> Case:
    return Case(version, Strategy.STOPPED, status="inmigrate", disks=0)


@pytest.mark.parametrize("on_demand", [False, True])
async def test_qemu_that_wants_all_pages_at_once(
    on_demand: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_scene(waiting("10.0.2")) as scene:
        incoming = Incoming(scene, takes_both=False)
        job = scene.new_job(JobKind.REVERT)
        assert not await can_load_on_demand(scene.vm.session)
        assert incoming.capabilities == set()
        assert not await load_memory(scene.vm, loading(scene, on_demand=on_demand), job)
        assert incoming.loaded_with == {"events", "mapped-ram"}
        assert incoming.status == "completed"
        assert_tidy(scene, incoming)
        await finish_loading(scene.vm, job)  # nothing is left to do


async def test_old_qemu_gets_a_named_descriptor(autojump_clock: trio.testing.MockClock) -> None:
    async with open_scene(waiting("7.2.22")) as scene:
        incoming = Incoming(scene, takes_both=False)
        assert not await can_load_on_demand(scene.vm.session)
        stream = loading(scene, image_format=ImageFormat.STREAM, on_demand=True)
        assert not await load_memory(scene.vm, stream, scene.new_job(JobKind.REVERT))
        assert incoming.loaded_with == {"events"}
        assert_tidy(scene, incoming)


async def test_qemu_that_reads_pages_on_demand(autojump_clock: trio.testing.MockClock) -> None:
    """The guest may go on as soon as its devices are loaded; then the rest is waited for."""
    async with open_scene(waiting("12.0.0")) as scene:
        incoming = Incoming(scene, takes_both=True)
        job = scene.new_job(JobKind.REVERT)
        assert await can_load_on_demand(scene.vm.session)
        assert incoming.capabilities == set()
        assert await load_memory(scene.vm, loading(scene, on_demand=True), job)
        assert incoming.loaded_with == {"events", *BOTH}
        assert (incoming.status, scene.qemu.status) == ("postcopy-active", "paused")
        assert scene.qemu.facts().fdsets  # QEMU reads from it
        scene.qemu.go()
        await finish_loading(scene.vm, job)
        assert incoming.status == "completed"
        assert_tidy(scene, incoming)


async def test_eager_stays_eager(autojump_clock: trio.testing.MockClock) -> None:
    async with open_scene(waiting("12.0.0")) as scene:
        incoming = Incoming(scene, takes_both=True)
        assert not await load_memory(scene.vm, loading(scene), scene.new_job(JobKind.REVERT))
        assert incoming.loaded_with == {"events", "mapped-ram"}
        assert_tidy(scene, incoming)


async def test_view_is_loaded_in_place_of_the_image(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_scene(waiting("10.0.2")) as scene:
        Incoming(scene, takes_both=False)
        missing = loading(scene, view=str(tmp_path / "view"), mapped=("pc.ram",))
        with pytest.raises(TargetRefused, match=r"cannot open .*view"):
            await load_memory(scene.vm, missing, scene.new_job(JobKind.REVERT))
        (tmp_path / "view").write_bytes(b"x")
        assert not await load_memory(scene.vm, missing, scene.new_job(JobKind.REVERT))


@pytest.mark.parametrize("stages", [("setup", "failed"), (*ON_DEMAND[:-1], "failed")])
async def test_load_that_fails(
    stages: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    async with open_scene(waiting("12.0.0")) as scene:
        Incoming(scene, takes_both=True, stages=stages)
        with pytest.raises(CaptureFailed, match="could not load the memory: planted"):
            await load_to_the_end(scene)


async def load_to_the_end(scene: Scene) -> None:
    job = scene.new_job(JobKind.REVERT)
    assert await load_memory(scene.vm, loading(scene, on_demand=True), job)
    await finish_loading(scene.vm, job)


def assert_tidy(scene: Scene, incoming: Incoming) -> None:
    facts = scene.qemu.facts()
    assert incoming.capabilities == set()
    assert facts.fdsets == {}
    assert facts.named_descriptors == frozenset()
