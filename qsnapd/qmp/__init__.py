"""Talking to QEMU: nothing above this package knows QMP's JSON."""
