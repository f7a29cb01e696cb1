"""Every target, fed twice over: what hypothesis makes of valid inputs, and what atheris finds."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.bounds import HEADROOM_BYTES, TIME_LIMIT_S, TooExpensive, bounded
from tests.fuzz.mutating import spoil_bytes, spoil_json
from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.target import Feed, Target

EXAMPLES = 40
GATE_SEED = 1
"""The gate finds the same every time; the long form takes another one."""
LONG_FORM_INPUTS = 1_000_000

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


@pytest.fixture
def feed(target: Target) -> Iterator[Feed]:
    with target.open() as feed:
        yield feed


@each_target
def test_valid_inputs(target: Target, feed: Feed) -> None:
    for seed in target.seeds():
        with bounded(len(seed)):
            feed(seed)


@each_target
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(noise=st.randoms(use_true_random=False), rounds=st.integers(1, 3))
def test_spoilt_inputs(target: Target, feed: Feed, noise: random.Random, rounds: int) -> None:
    data = noise.choice(target.seeds())
    for _ in range(rounds):
        data = target.spoil(data, noise)
    data = data[: target.max_bytes]
    with bounded(len(data)):
        feed(data)


@each_target
@settings(max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_noise(target: Target, feed: Feed, data: bytes) -> None:
    with bounded(len(data)):
        feed(data)


def test_guided_by_coverage(tmp_path: Path) -> None:
    done = fuzz("--seed", str(GATE_SEED), "--failures", str(tmp_path))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in TARGETS)
    assert list(tmp_path.iterdir()) == []


def fuzz(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_long_form_is_long() -> None:
    assert sum(target.runs_long for target in TARGETS.values()) >= LONG_FORM_INPUTS


# --- would they notice? ----------------------------------------------------------------------

PLANTED = """
import sys
from contextlib import nullcontext
from pathlib import Path
from tests.fuzz import running
from tests.fuzz.targets.target import Target
from qsnapd.model.names import check_name

def feed(data: bytes) -> None:
    if data[:2] == b"ok":
        try:
            check_name(data[2:].decode("latin1"))
        except ValueError as exc:
            assert "must not start with '-'" not in str(exc), "the planted one"

running.TARGETS["planted"] = Target("planted", lambda: nullcontext(feed), lambda: [b"okname"])
[found] = running.run_all({"planted": 100_000}, seed=1, failures=Path(sys.argv[1]), jobs=1)
assert found.failure is not None and "the planted one" in found.failure, found
assert found.inputs < 100_000, found
"""


def test_a_planted_bug_is_found_and_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [kept] = tmp_path.iterdir()
    assert kept.read_bytes().startswith(b"ok-")


def test_too_much_memory_is_noticed() -> None:
    with pytest.raises(MemoryError), bounded(10):
        bytearray(2 * HEADROOM_BYTES)
    bytearray(2 * HEADROOM_BYTES)  # and allowed again


def test_too_much_time_is_noticed() -> None:
    with pytest.raises(TooExpensive, match="10 bytes took"), bounded(10):
        _be_busy(1.1 * TIME_LIMIT_S)


def _be_busy(seconds: float) -> None:
    began_s = time.process_time()
    while time.process_time() - began_s < seconds:
        pass


@pytest.mark.parametrize("number", range(20))
def test_spoiling_is_the_same_each_time(number: int) -> None:
    for spoil, data in ((spoil_json, b'{"a": [1, "x", {"b": null}]}'), (spoil_bytes, b"x" * 99)):
        once, again = (spoil(data, random.Random(number)) for _ in range(2))
        assert once == again
        assert isinstance(once, bytes)


def test_an_input_can_be_fed_once_more(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"\0" + os.urandom(10))
    assert fuzz("manifest", "--input", str(file)).returncode == 0
    assert "there is no target 'nonsense'" in fuzz("nonsense", "--input", str(file)).stderr
