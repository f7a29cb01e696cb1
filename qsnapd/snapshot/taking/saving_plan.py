"""Which strategy and image format to use, and what to tell QEMU's migration for them."""

from collections.abc import Mapping
from typing import Any

from qsnapd.errors import CapabilityMissing
from qsnapd.model.base import Frozen
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.snapshot.taking.situation import Situation

MULTIFD_CHANNELS = 2


# Explicit, because what an earlier user left behind sticks: direct-io crashes a multifd save
# (10.0), tls-creds fails every one, and without zero pages an image has the size of all RAM.
_PARAMETERS: dict[str, Any] = {
    "direct-io": False,
    "tls-creds": "",
    "multifd-compression": "none",
    "zero-page-detection": "multifd",
    "mode": "normal",
}


class SavingPlan(Frozen):
    """How memory is captured; the part of a plan that is all about `migrate`."""

    strategy: Strategy
    image_format: ImageFormat
    capabilities: dict[str, bool]
    capabilities_before: dict[str, bool]
    parameters: dict[str, Any]
    parameters_before: dict[str, Any]
    by_fdset: bool
    drained: bool
    cancellable: bool


def plan_saving(request: CreateRequest, now: Situation) -> SavingPlan:
    """Choose strategy and format, and the capabilities and parameters they need.

    Raises: CapabilityMissing: the request forces what this QEMU or host cannot do.
    """
    strategy = choose_strategy(request, now)
    image_format = choose_format(request, now, strategy)
    mapped = image_format is ImageFormat.MAPPED_RAM
    multifd = mapped and strategy is Strategy.STOPPED and "multifd" in now.capabilities
    wanted = {"events"}
    if mapped:
        wanted.add("mapped-ram")
    if multifd:
        wanted.add("multifd")
    if strategy is Strategy.PRECOPY:
        wanted.add("pause-before-switchover")
    if strategy is Strategy.BACKGROUND:
        wanted.add("background-snapshot")
    parameters = {
        name: value for name, value in _PARAMETERS.items() if name in now.parameters
    }
    parameters["max-bandwidth"] = now.bandwidth_bytes_per_s
    if multifd:
        parameters["multifd-channels"] = MULTIFD_CHANNELS
    return SavingPlan(
        strategy=strategy,
        image_format=image_format,
        capabilities=_differences(wanted, now.capabilities),
        capabilities_before={
            name: now.capabilities[name] for name in _differences(wanted, now.capabilities)
        },
        parameters=parameters,
        parameters_before={k: now.parameters[k] for k in parameters if k in now.parameters},
        by_fdset="mapped-ram" in now.capabilities,
        drained=strategy is Strategy.BACKGROUND and not now.at_least_10,
        # Cancelling a multifd save crashes QEMU now and then (seen on 10.0 and 11.1);
        # cancelling a background snapshot freezes QEMU < 10.0.
        cancellable=not multifd and (strategy is not Strategy.BACKGROUND or now.at_least_10),
    )


def _differences(wanted: set[str], now: Mapping[str, bool]) -> dict[str, bool]:
    """Every capability explicitly: what an earlier user left on would change the image."""
    return {name: name in wanted for name, state in now.items() if state != (name in wanted)}


def choose_strategy(request: CreateRequest, now: Situation) -> Strategy:
    """The strategy asked for by name, or the best of the kind asked for."""
    if request.strategy is Strategy.BACKGROUND:
        if now.background_refusal is not None:
            raise CapabilityMissing(
                f"the background strategy is not to be had here: {now.background_refusal}. It "
                "needs userfaultfd: QEMU as root, or access to /dev/userfaultfd, or sysctl "
                "vm.unprivileged_userfaultfd=1. --live alone takes what works"
            )
        if not now.running and not now.at_least_10:
            raise CapabilityMissing(
                "the VM is paused, and background-snapshot of QEMU before 9.0 would resume it: "
                "use --strategy stopped"
            )
    if request.strategy is not None:
        return request.strategy
    if not request.live:
        return Strategy.STOPPED
    if now.at_least_10 and now.background_refusal is None:
        return Strategy.BACKGROUND
    return Strategy.PRECOPY if now.running else Strategy.STOPPED


def choose_format(request: CreateRequest, now: Situation, strategy: Strategy) -> ImageFormat:
    """The format asked for, else mapped-ram wherever QEMU has it."""
    mapped_known = "mapped-ram" in now.capabilities
    if request.image_format is ImageFormat.MAPPED_RAM and not mapped_known:
        raise CapabilityMissing("this QEMU has no mapped-ram (it came with 9.0): use stream")
    if strategy is Strategy.BACKGROUND and not now.at_least_10:
        # Through the draining pipe, which cannot seek.
        if request.image_format is ImageFormat.MAPPED_RAM:
            raise CapabilityMissing(
                "mapped-ram with the background strategy needs QEMU 10.0: use stream"
            )
        return ImageFormat.STREAM
    if request.image_format is not None:
        return request.image_format
    return ImageFormat.MAPPED_RAM if mapped_known else ImageFormat.STREAM
