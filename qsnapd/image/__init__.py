"""Memory images: the files QEMU's migration streams lie in. Synchronous; callers use a thread."""
