"""Nonsense for every parser and peer of qsnapd: it is refused in words, at a bounded price."""
