"""A QEMU that does what it is told, and says something else about it."""

import trio.testing

from qsnapd.model.snapshot import ImageFormat, Strategy
from tests.faults.scene import Case, open_scene


async def test_a_capability_that_is_gone_is_not_put_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    case = Case("10.0.2", Strategy.STOPPED, ImageFormat.MAPPED_RAM)
    async with open_scene(case) as scene:

        def forget_mapped_ram(result: object) -> object:
            if scene.qemu.migration.save is None or not isinstance(result, list):
                return result
            return [entry for entry in result if entry.get("capability") != "mapped-ram"]

        scene.qemu.monitor.lies = forget_mapped_ram
        manifest = await scene.take_one()
        assert scene.store.manifest("s1") == manifest
        assert scene.store.journal.read() is None
