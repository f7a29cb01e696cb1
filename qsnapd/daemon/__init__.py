"""The daemon: supervisors, jobs and the control socket, each alive as long as it must be."""

from qsnapd.daemon.reconcile import reconcile
from qsnapd.daemon.serve import serve

__all__ = ["reconcile", "serve"]
