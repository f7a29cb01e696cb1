"""How much tests try: a sample, all that there is, or for as long as it takes."""

import os

LONG = os.environ.get("QSNAPD_LONG") == "1"
"""Everything, and again and again where chance decides: `make soak`."""
ALL = LONG or os.environ.get("QSNAPD_ALL") == "1"
"""Every attack in every way, in an hour: `make faults`. The gate has time for some."""
