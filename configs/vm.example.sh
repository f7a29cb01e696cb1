#!/bin/sh
# A VM that qsnapd can checkpoint: an example to copy the relevant lines from.
#
#   usage: vm.example.sh DISK.qcow2
#
# What qsnapd needs of a QEMU command line:
#   - a QMP monitor of its own (the -chardev/-mon pair below). QEMU serves one client per
#     monitor, so tools that also talk QMP get a second pair with another path;
#   - disks with a node-name or an id, so that a restored VM finds them again;
#   - a versioned machine type keeps checkpoints usable after a QEMU upgrade
#     (list them with: qemu-system-x86_64 -machine help);
#   - nothing that blocks migration: no passed-through devices, no 9p shares.
# Live checkpoints with the shortest pause need QEMU >= 10.0 and userfaultfd: QEMU as root,
# or access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1.
set -eu

disk=${1:?"usage: $0 DISK.qcow2"}
run=/run/qemu/example
mkdir -p "$run"

exec qemu-system-x86_64 \
    -name example \
    -machine q35,accel=kvm:tcg \
    -cpu max \
    -smp 2 \
    -m 1024 \
    -nodefaults \
    -display none \
    -blockdev driver=file,filename="$disk",node-name=disk0-file,aio=threads \
    -blockdev driver=qcow2,file=disk0-file,node-name=disk0 \
    -device virtio-blk-pci,drive=disk0,id=vda \
    -netdev user,id=net0 \
    -device virtio-net-pci,netdev=net0 \
    -serial "file:$run/console.log" \
    -chardev socket,id=qsnapd,path="$run/qmp.sock",server=on,wait=off \
    -mon chardev=qsnapd,mode=control \
    -chardev socket,id=agent,path="$run/agent.sock",server=on,wait=off \
    -device virtio-serial-pci \
    -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0
