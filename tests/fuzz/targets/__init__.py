"""What is fed: one function from bytes to nothing for each parser and peer of qsnapd.

A target feeds its input to qsnapd and asserts the contract: only the errors that the docstrings
name come out, and what is accepted is what the rest of qsnapd takes for granted. Any other
exception is a bug. Time and memory are held down by whoever drives it (`tests.fuzz.bounds`).
"""

from tests.fuzz.targets import (
    answers,
    control,
    images,
    imports,
    peers,
    records,
    stores,
    texts,
    words,
)
from tests.fuzz.targets.target import Target

_MODULES = (texts, records, stores, images, imports, words, control, peers, answers)

TARGETS: dict[str, Target] = {
    target.name: target for module in _MODULES for target in module.TARGETS
}
