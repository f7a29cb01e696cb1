"""libvirt's `<domainsnapshot>`: read from people and scripts, written for them. No I/O."""
