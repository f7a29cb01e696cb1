"""The two commands: `qsnapd`, the daemon, and `qsnapctl`, which speaks virsh's verbs."""
