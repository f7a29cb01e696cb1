"""snapshot-fsck: facts about records, files and QEMU, judged, and mended where that is safe."""
