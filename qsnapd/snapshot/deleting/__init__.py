"""Deleting snapshots: the graph of images, what is to be merged, online and offline."""
