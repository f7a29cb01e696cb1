"""One VM: who its process is, what state it is in, which disks it has."""
