"""External checkpoints of running QEMU virtual machines, over QMP, without libvirt."""

__version__ = "0.1.0"
