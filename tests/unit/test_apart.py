"""The command line of a second VM beside the first."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.errors import Blocked
from qsnapd.model.request import Identity
from qsnapd.vm.apart import Apart, set_apart
from qsnapd.vm.apart_seen import renew_generation_id
from qsnapd.vm.argv import Option, parse_options, words_of
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import beside

QMP = "/run/q/qmp"
MONITOR = f"-qmp unix:{QMP},server=on,wait=off"
OWN_MONITOR = "-qmp unix:/run/q/qmp.two,server=on,wait=off"
NAME = "-name guest=two"
WORDS = st.text(st.sampled_from("ab2.~%-_ ü"), min_size=1, max_size=6)


def apart(
    words: str | list[str],
    *,
    clone: str = "two",
    mac: Identity = Identity.KEEP,
    uuid: Identity = Identity.NEW,
    qmp_to: str | None = None,
    images: tuple[str, ...] = (),
    substitutes: dict[str, str] | None = None,
    is_taken: Callable[[str], bool] = lambda path: False,
    seed: str = "seed",
) -> Apart:
    given_words = words.split() if isinstance(words, str) else words
    return set_apart(
        parse_options([*given_words, *MONITOR.split()]),
        clone=clone,
        cwd="/vm",
        seed=seed,
        qmp_from=QMP,
        qmp_to=qmp_to,
        images=images,
        mac=mac,
        uuid=uuid,
        substitutes=substitutes,
        is_taken=is_taken,
        is_folder=lambda path: path == "/dev/hugepages",
    )


def changed(result: Apart) -> list[str]:
    """Without what every one of them ends with."""
    words = list(words_of(result.options))
    assert words[-4:] == [*OWN_MONITOR.split(), *NAME.split()]
    return words[:-4]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # unix sockets that are listened on
        ("-chardev socket,id=c,path=/run/q/con.sock,server=on,wait=off",
         "-chardev socket,id=c,path=/run/q/con.two.sock,server=on,wait=off"),
        ("-chardev socket,path=/r/c,,d.sock,id=c,server,nowait",
         "-chardev socket,path=/r/c,,d.two.sock,id=c,server,nowait"),
        ("-chardev socket,id=c,path=con,server=on,logfile=con.log",
         "-chardev socket,id=c,path=con.two,server=on,logfile=con.two.log,wait=off"),
        ("-serial unix:/run/q/s.sock,server=on",
         "-serial unix:/run/q/s.two.sock,server=on,wait=off"),
        ("-monitor unix:m,server,nowait", "-monitor unix:m.two,server,nowait"),
        ("-serial mon:unix:/r/m,server=on,wait=off",
         "-serial mon:unix:/r/m.two,server=on,wait=off"),
        ("-gdb unix:/r/gdb,server=on,wait=off", "-gdb unix:/r/gdb.two,server=on,wait=off"),
        ("-vnc unix:/r/v.sock,password=on", "-vnc unix:/r/v.two.sock,password=on"),
        ("-display vnc=unix:/r/v.sock", "-display vnc=unix:/r/v.two.sock"),
        ("-spice unix=on,addr=/r/spice.sock", "-spice unix=on,addr=/r/spice.two.sock"),
        ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=/r/n",
         "-netdev stream,id=n,server=on,addr.type=unix,addr.path=/r/n.two"),
        ("-netdev dgram,id=n,local.type=unix,local.path=/r/n,remote.type=unix,remote.path=/r/p",
         "-netdev dgram,id=n,local.type=unix,local.path=/r/n.two,remote.type=unix,"
         "remote.path=/r/p"),
        ("-netdev user,id=n,guestfwd=tcp:10.0.2.9:80-unix:/r/g,,server=on",
         "-netdev user,id=n,guestfwd=tcp:10.0.2.9:80-unix:/r/g.two,,server=on,,wait=off"),
        # files that are written to
        ("-serial file:/log/a,b.log", "-serial file:/log/a,b.two.log"),
        ("-debugcon file:d", "-debugcon file:d.two"),
        ("-chardev file,id=c,path=/log/c.log,append=on",
         "-chardev file,id=c,path=/log/c.two.log,append=on"),
        ("-chardev null,id=c,logfile=/log/c", "-chardev null,id=c,logfile=/log/c.two"),
        ("-chardev pty,id=c,path=/run/q/pty", "-chardev pty,id=c,path=/run/q/pty.two"),
        ("-D /log/q.log -pidfile q.pid", "-D /log/q.two.log -pidfile q.two.pid"),
        ("-D /log/q-%d.log", "-D /log/q-%d.log"),
        ("-trace enable=x*,file=/t/x.bin", "-trace enable=x*,file=/t/x.two.bin"),
        ("-trace x*", "-trace x*"),
        ("-audiodev wav,id=a,path=/a.wav", "-audiodev wav,id=a,path=/a.two.wav"),
        ("-object filter-dump,id=f,netdev=n,file=/d.pcap",
         "-object filter-dump,id=f,netdev=n,file=/d.two.pcap"),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on",
         "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m.two,share=on"),
        # ports
        ("-chardev socket,id=c,host=::1,port=4444,to=4500,server=on,wait=off",
         "-chardev socket,id=c,host=::1,port=0,server=on,wait=off"),
        ("-serial tcp:127.0.0.1:4444,server=on,wait=off",
         "-serial tcp:127.0.0.1:0,server=on,wait=off"),
        ("-monitor telnet::4444,server,nowait", "-monitor telnet::0,server,nowait"),
        ("-serial udp:host:9@:4444", "-serial udp:host:9@:0"),
        ("-chardev udp,id=c,port=9,localport=4444", "-chardev udp,id=c,port=9,localport=0"),
        ("-gdb tcp:127.0.0.1:1234", "-gdb tcp:127.0.0.1:0"),
        ("-s", "-gdb tcp::0"),
        ("-vnc :0", "-vnc :1,to=100"),
        ("-vnc [::1]:3,to=9,websocket=5800,share=ignore",
         "-vnc [::1]:4,to=103,websocket=on,share=ignore"),
        ("-display vnc=127.0.0.1:5", "-display vnc=127.0.0.1:6,to=105"),
        ("-netdev user,id=n,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:53-10.0.2.15:53",
         "-netdev user,id=n,hostfwd=tcp::0-:22,hostfwd=udp:127.0.0.1:0-10.0.2.15:53"),
        ("-nic user,hostfwd=tcp::2222-:22,model=e1000", "-nic user,hostfwd=tcp::0-:22,model=e1000"),
        ("-netdev socket,id=n,listen=:1234", "-netdev socket,id=n,listen=:0"),
        ("-netdev stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=7",
         "-netdev stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=0"),
        # what stays
        ("-serial stdio -parallel none -monitor vc -serial chardev:c -serial pty -serial null",
         "-serial stdio -parallel none -monitor vc -serial chardev:c -serial pty -serial null"),
        ("-chardev socket,id=c,path=/r/other", "-chardev socket,id=c,path=/r/other"),
        ("-vnc none", "-vnc none"),
        ("-netdev tap,id=n,script=/up", "-netdev tap,id=n,script=/up"),
        ("-netdev tap,id=n,ifname=vm%d", "-netdev tap,id=n,ifname=vm%d"),
        ("-netdev bridge,id=n,br=br0", "-netdev bridge,id=n,br=br0"),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=on",
         "-object memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=on"),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/m,share=off",
         "-object memory-backend-file,id=m,size=1G,mem-path=/m,share=off"),
        ("-chardev file,id=c,path=/dev/null", "-chardev file,id=c,path=/dev/null"),
        ("-device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56 -kernel /k -cdrom /c.iso",
         "-device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56 -kernel /k -cdrom /c.iso"),
    ],
)  # fmt: skip
def test_what_two_vms_cannot_share(before: str, after: str) -> None:
    assert changed(apart(before)) == after.split()


def test_json_stays_json() -> None:
    netdev = {"type": "user", "id": "n", "hostfwd": [{"str": "tcp::22-:22"}, {"str": ":1:5-:5"}]}
    stream = {"type": "stream", "id": "s", "server": True, "addr": {"type": "unix", "path": "/r/s"}}
    ram = {"qom-type": "memory-backend-file", "id": "m", "mem-path": "/m", "share": True, "size": 9}
    card = {"driver": "vhost-vsock-pci", "guest-cid": 3}
    words = changed(
        apart(
            [
                *("-netdev", json.dumps(netdev), "-netdev", json.dumps(stream)),
                *("-object", json.dumps(ram), "-device", json.dumps(card)),
            ]
        )
    )
    first, second, third, fourth = (json.loads(word) for word in words[1::2])
    assert first == {**netdev, "hostfwd": [{"str": "tcp::0-:22"}, {"str": ":1:0-:5"}]}
    assert second == {**stream, "addr": {"type": "unix", "path": "/r/s.two"}}
    assert third == {**ram, "mem-path": "/m.two"}
    assert isinstance(fourth.pop("guest-cid"), int)
    assert fourth == {"driver": "vhost-vsock-pci"}


def test_it_says_what_was_renamed_to_what() -> None:
    result = apart(
        "-serial file:s.log -chardev pipe,id=p,path=/r/p -D /l -chardev file,id=x,path=/l"
    )
    assert result.renamed == {
        "/vm/s.log": "/vm/s.two.log",
        "/r/p": "/r/p.two",
        "/l": "/l.two",
        QMP: "/run/q/qmp.two",
    }
    assert result.pipes == ("/r/p.two.in", "/r/p.two.out")
    assert result.qmp == "/run/q/qmp.two"


def test_the_monitor_is_where_it_was_asked_for() -> None:
    result = apart("", qmp_to="/elsewhere/m,1")
    assert result.qmp == "/elsewhere/m,1"
    assert words_of(result.options)[1] == "unix:/elsewhere/m,,1,server=on,wait=off"


def test_a_monitor_that_the_command_line_does_not_name_is_added() -> None:
    result = set_apart(
        parse_options(["-name", "one,process=p"]),
        clone="two", cwd="/", seed="", qmp_from=QMP, is_taken=lambda path: False,
    )  # fmt: skip
    assert words_of(result.options) == ("-name", "two,process=p", *OWN_MONITOR.split())


def test_a_clone_of_which_there_is_already_a_file_takes_another_name() -> None:
    there = {"/l/s.two.log", "/run/q/qmp.two"}
    result = apart("-serial file:/l/s.log", is_taken=there.__contains__)
    assert result.renamed == {"/l/s.log": "/l/s.two~2.log", QMP: "/run/q/qmp.two~2"}


def test_no_name_of_the_original_is_taken_for_another_of_its_files() -> None:
    result = apart("-D /l/s.log -serial file:/l/s.two.log")
    assert result.renamed["/l/s.log"] == "/l/s.two~2.log"
    assert result.renamed["/l/s.two.log"] == "/l/s.two.two.log"


@given(st.lists(st.tuples(WORDS, WORDS), max_size=8, unique=True))
def test_two_clones_never_collide(pairs: list[tuple[str, str]]) -> None:
    pairs = [(f"/r/{path.strip('/. ')}x", clone) for path, clone in pairs]
    made = {beside(path, clone) for path, clone in pairs}
    assert len(made) == len(set(pairs))


@pytest.mark.parametrize(
    ("words", "because"),
    [
        ("-netdev tap,id=n,ifname=tap0", "interface tap0 is the original's"),
        ("-nic tap,ifname=tap0", "interface tap0 is the original's"),
        ("-spice port=5930,disable-ticketing=on", "cannot choose a free port for SPICE"),
        ("-spice tls-port=5931", "place of 5931"),
        ("-serial /dev/ttyS0", "device /dev/ttyS0 is the original's"),
        ("-chardev serial,id=c,path=/dev/ttyS0", "device /dev/ttyS0 is the original's"),
        ("-chardev socket,id=v,path=/r/v -netdev vhost-user,id=n,chardev=v", "by vhost-user"),
        ("-chardev socket,id=v,path=/r/v -device vhost-user-fs-pci,chardev=v,tag=t",
         "by vhost-user"),
        ("-object cryptodev-vhost-user,id=o,chardev=v", "by vhost-user"),
        ("-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", "one VM only"),
        ("-device vfio-pci,host=01:00.0", "one VM only"),
        ("-tpmdev emulator,id=t,chardev=c", "in another process"),
        ("-icount 3,rr=record,rrfile=/l/r", "one run of the original"),
        ("-readconfig vm.cfg", "does not read this file"),
        ("-set device.n.mac=1", "into the -device itself"),
        ("-drive file=/img/a,format=raw", "/img/a is writable"),
        ("-fda /img/a", "/img/a is writable"),
        ("-blockdev driver=nbd,node-name=n,server.type=unix,server.path=/x", "over nbd"),
        ("-object {'id':'x'}", "cannot read this JSON"),
        (f"-serial unix:/{'x' * 103},server=on", "1 bytes longer"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_twice_is_refused(words: str, because: str) -> None:
    with pytest.raises(Blocked, match=because):
        apart(words)


def test_a_relative_socket_may_lie_deep() -> None:
    result = set_apart(
        parse_options(["-qmp", "unix:q,server=on"]),
        clone="two", cwd=f"/{'x' * 200}", seed="", qmp_from=f"/{'x' * 200}/q", qmp_to="/r/q",
        is_taken=lambda path: False,
    )  # fmt: skip
    assert words_of(result.options)[1] == "unix:/r/q,server=on,wait=off"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-netdev tap,id=n,ifname=tap0", "-netdev tap,id=n,ifname=mine"),
        ("-spice port=5930", "-spice port=mine"),
        ("-netdev user,id=n,hostfwd=tcp::5930-:22", "-netdev user,id=n,hostfwd=tcp::mine-:22"),
        ("-serial tcp::5930,server=on,wait=off", "-serial tcp::mine,server=on,wait=off"),
        ("-serial file:/l/s", "-serial file:mine"),
        ("-serial /dev/ttyS0", "-serial mine"),
        ("-vnc :5930,to=9", "-vnc :mine"),
        ("-device vhost-vsock-pci,guest-cid=5930", "-device vhost-vsock-pci,guest-cid=mine"),
        ("-chardev socket,id=v,path=/r/v -device vhost-user-fs-pci,chardev=v,tag=t",
         "-chardev socket,id=v,path=mine -device vhost-user-fs-pci,chardev=v,tag=t"),
    ],
)  # fmt: skip
def test_what_was_named_stands_in_for_it(before: str, after: str) -> None:
    [old] = {"tap0", "5930", "/l/s", "/dev/ttyS0", "/r/v"} & {
        word for word in ("tap0", "5930", "/l/s", "/dev/ttyS0", "/r/v") if word in before
    }
    assert changed(apart(before, substitutes={old: "mine"})) == after.split()


def test_a_substitute_for_nothing_is_a_mistake() -> None:
    with pytest.raises(Blocked, match="called tap7"):
        apart("-netdev tap,id=n", substitutes={"tap7": "tap8"})


def test_images_of_the_clone_are_its_own() -> None:
    words = (
        "-drive file=/img/new.qcow2,format=qcow2 -blockdev driver=file,node-name=f,filename=n2 "
        "-drive file=/img/base,format=raw,readonly=on -cdrom /c.iso"
    )
    assert changed(apart(words, images=("/img/new.qcow2", "n2"))) == words.split()


CARDS = (
    "-device virtio-net-pci,netdev=a,mac=52:54:00:00:00:01 -device e1000,netdev=b "
    "-nic user,model=e1000 -net nic,macaddr=52:54:00:00:00:02 -device virtio-rng-pci"
)


def macs(result: Apart) -> list[str]:
    values = [Members.parse(option.value or "", "x") for option in result.options]
    return [value.get(key) for value in values for key in ("mac", "macaddr") if key in value]


def test_every_network_card_gets_an_address_of_its_own() -> None:
    one, two = (macs(apart(CARDS, mac=Identity.NEW, seed=seed)) for seed in ("a", "b"))
    assert len({*one, *two}) == 8
    for mac in (*one, *two):
        first = int(mac[:2], 16)
        assert first & 1 == 0, "it must be unicast"
        assert first & 2 == 2, "it must be locally administered"
    assert macs(apart(CARDS, mac=Identity.NEW, seed="a")) == one, "one plan, one answer"


def test_addresses_are_kept_where_that_is_asked_for() -> None:
    assert changed(apart(CARDS, mac=Identity.KEEP)) == CARDS.split()


def test_the_uuid_is_new_wherever_it_is_told() -> None:
    words = "-uuid 11111111-2222-4333-8444-5555 -smbios type=1,uuid=x,serial=s -smbios type=0"
    new = changed(apart(words))
    assert new[1] != words.split()[1]
    assert new[3] == f"type=1,uuid={new[1]},serial=s"
    assert new[5] == "type=0"
    assert changed(apart(words, uuid=Identity.KEEP)) == words.split()


def test_the_generation_is_a_new_one() -> None:
    guid = "11111111-2222-4333-8444-555555555555"
    before = [
        Option("device", f"vmgenid,guid={guid},id=g"),
        Option("device", json.dumps({"driver": "vmgenid", "guid": guid})),
        Option("device", "vmgenid,guid=auto"),
        Option("device", "e1000,id=vmgenid"),
    ]
    after = renew_generation_id(before)
    assert after[0].value != before[0].value
    assert Members.of(after[0], "driver").get("id") == "g"
    assert json.loads(after[1].value or "")["guid"] != guid
    assert after[2:] == before[2:]


def test_notes_say_what_differs_and_what_is_shared() -> None:
    result = apart(
        "-device e1000,netdev=n,id=card -uuid u -chardev socket,id=c,path=/r/peer "
        "-netdev user,id=n,hostfwd=tcp::22-:22 -fsdev local,id=f,path=/share",
        mac=Identity.NEW,
    )
    text = "\n".join(result.notes)
    for words in ("card: MAC address", "UUID", "connects to /r/peer", "free port", "/share"):
        assert words in text
