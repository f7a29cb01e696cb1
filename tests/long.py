"""Whether tests take as long as they like: all of it, instead of a sample."""

import os

LONG = os.environ.get("QSNAPD_LONG") == "1"
