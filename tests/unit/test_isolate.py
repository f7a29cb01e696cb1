"""The command line of a QEMU that only loads."""

import pytest

from qsnapd.errors import Blocked
from qsnapd.vm.argv import parse_options, words_of
from qsnapd.vm.isolate import Isolated, isolate

END = "-display none -monitor none"


def isolated(words: str) -> Isolated:
    return isolate(parse_options(words.split()), "/tmp/x")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-machine pc,accel=kvm -cpu host -m 1G -smp 2 -device e1000,netdev=n",
         "-machine pc,accel=kvm -cpu host -m 1G -smp 2 -device e1000,netdev=n"),
        # nothing behind
        ("-chardev socket,id=c,path=/r/c,server=on,logfile=/l -mon chardev=c,mode=control",
         "-chardev null,id=c"),
        ("-chardev stdio,id=c,mux=on,signal=off", "-chardev null,id=c,mux=on"),
        ("-chardev ringbuf,id=c,size=64,logfile=/l", "-chardev ringbuf,id=c,size=64"),
        ("-serial unix:/r/s,server=on -serial none -serial chardev:c -parallel /dev/lp0",
         "-serial null -serial none -serial chardev:c -parallel null"),
        ("-serial mon:stdio", "-serial null"),
        ("-qmp unix:/q,server=on -monitor stdio -s -gdb tcp::1 -D /l -pidfile /p -daemonize", ""),
        ("-vnc :0 -display gtk,gl=on -name x -runas nobody -chroot /c -trace file=/t", ""),
        ("-nographic", "-machine graphics=off"),
        ("-spice port=5930,password-secret=s",
         "-spice unix=on,addr=/tmp/x/spice,disable-ticketing=on"),
        ("-audiodev pa,id=a,server=/p -audio pa,model=hda",
         "-audiodev none,id=a -audio none,model=hda"),
        # networks
        ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=/x -netdev socket,id=o,listen=:1",
         "-netdev hubport,id=n,hubid=1 -netdev hubport,id=o,hubid=2"),
        ("-nic socket,model=e1000,mac=52:54:00:00:00:01,connect=:9",
         "-nic hubport,model=e1000,mac=52:54:00:00:00:01,hubid=1"),
        ("-netdev user,id=n,hostfwd=tcp::22-:22,net=10.0.3.0/24,hostfwd=udp::1-:1,smb=/s,"
         "guestfwd=tcp:10.0.3.9:80-unix:/x,guestfwd=tcp:10.0.3.9:81-cmd:cat",
         "-netdev user,id=n,net=10.0.3.0/24,"
         "guestfwd=tcp:10.0.3.9:80-null,guestfwd=tcp:10.0.3.9:81-cmd:cat"),
        ("-nic none", "-nic none"),
        ("-net nic,model=e1000 -net tap,ifname=t", "-net nic,model=e1000"),
        ("-net user,hostfwd=tcp::22-:22", "-net user"),
        ("-net tap", "-net none"),
        # memory and the like
        ("-object memory-backend-file,id=m,size=1G,mem-path=/h,share=on,prealloc=on",
         "-object memory-backend-ram,id=m,size=1G"),
        ("-object memory-backend-memfd,id=m,size=1G,hugetlb=on,host-nodes=0,policy=bind",
         "-object memory-backend-ram,id=m,size=1G"),
        ("-mem-path /dev/hugepages -mem-prealloc -overcommit mem-lock=on", ""),
        ("-object filter-dump,id=f,netdev=n,file=/d -object iothread,id=i",
         "-object iothread,id=i"),
    ],
)  # fmt: skip
def test_it_touches_nothing(before: str, after: str) -> None:
    result = isolated(before)
    assert words_of(result.options) == tuple(f"{after} {END}".split())
    assert not result.needs_own_network


@pytest.mark.parametrize(
    "network",
    [
        "tap,id=n,ifname=t,vhost=on,queues=4,script=/up",
        "bridge,id=n,br=br0",
    ],
)
def test_a_card_that_knew_offloading_still_does(network: str) -> None:
    result = isolated(f"-netdev {network}")
    queues = "queues=4," if "queues" in network else ""
    assert words_of(result.options)[1] == f"tap,id=n,{queues}script=no,downscript=no"
    assert result.needs_own_network


def test_a_context_id_is_another() -> None:
    [word] = words_of(isolated("-device vhost-vsock-pci,guest-cid=3").options)[1:2]
    assert word.startswith("vhost-vsock-pci,guest-cid=")
    assert word != "vhost-vsock-pci,guest-cid=3"


@pytest.mark.parametrize(
    "words",
    [
        "-netdev vhost-user,id=n,chardev=c",
        "-tpmdev emulator,id=t,chardev=c",
        "-readconfig f",
        "-icount auto,rr=replay,rrfile=f",
    ],
)
def test_what_needs_another_process_is_refused(words: str) -> None:
    with pytest.raises(Blocked, match=words.split()[1].split(",")[0]):
        isolated(words)
