"""Attacks on qsnapd's promises: a guest that ran runs, nothing is lost, nothing is left behind.

Each attack does the same thing many times, each time with something else going wrong, and counts
what was found wrong afterwards. `make faults` prints the counts; QSNAPD_LONG=1 does more of each.
"""
