"""Losing power at every step of a recording, in every way, and starting again."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from tests.crashes.judge import Judge
from tests.crashes.medium import Medium, State
from tests.crashes.promises import Promise
from tests.crashes.recorder import Recorder, Said
from tests.crashes.scene import Scene
from tests.crashes.stage import Stage
from tests.tallies import Record, count


@dataclass(frozen=True)
class Failure:
    """One moment at which the power fails, and what is there then."""

    step: int
    words: str
    state: State
    promise: Promise


@dataclass
class Replayed:
    """What came of it."""

    name: str
    steps: int
    states: int
    replayed: int = 0
    violations: list[str] = field(default_factory=list)

    def count(self, record: Record) -> None:
        numbers = {
            "steps": self.steps,
            "states": self.states,
            "replayed": self.replayed,
            "violations": len(self.violations),
        }
        count(record, "power that fails at any step", self.name, numbers)


def failures(recorder: Recorder, name: str, mixtures: int) -> Iterator[Failure]:
    """Yield all that differ in what is there, or in what is promised."""
    medium = Medium(recorder)
    promise: Promise | None = None
    seen = set[tuple[object, Promise]]()
    for number, step in enumerate(recorder.steps):
        medium.apply(step)
        if isinstance(step, Said):
            assert isinstance(step.promise, Promise)
            promise = step.promise
        if promise is None:
            continue
        for state in medium.states(f"{name} {number}", mixtures):
            if (state.key, promise) not in seen:
                seen.add((state.key, promise))
                yield Failure(number, step.words, state, promise)


async def replay(scene: Scene, name: str, *, mixtures: int, at_most: int | None) -> Replayed:
    """Lose power again and again; *at_most*: so many times, chosen by the name."""
    assert scene.recorder is not None
    await scene.lose_power()
    chosen = list(failures(scene.recorder, name, mixtures))
    result = Replayed(name, len(scene.recorder.steps), len(chosen))
    if at_most is not None and at_most < len(chosen):
        chosen = random.Random(name).sample(chosen, at_most)
    stage, judge = Stage(scene.recorder), Judge(scene)
    with stage.playing(), mock.patch("qsnapd.daemon.supervisor.FILE_CLOCK_LAG_S", 0.0):
        for failure in chosen:
            stage.set(failure.state)
            for words in await judge.boot(failure.promise):
                at = f"step {failure.step} ({failure.words}), {failure.state.kind}"
                result.violations.append(f"{at}: {words}")
            result.replayed += 1
    return result
