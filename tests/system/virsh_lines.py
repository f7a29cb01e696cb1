"""The lines: every verb of virsh's manual for snapshots and those that scripts use with them.

In the order in which they are run, on a VM with two disks, vda and vdb. What is printed is
virsh's own, as version 9.0 prints it, except where qsnapctl says more. Every combination that
libvirt refuses, and that a command line can say, is among them.
"""

from tests.system.virsh_looking import LISTED, LISTENED, NOTHING_YET, SHOWN, VMS_BEFORE
from tests.system.virsh_session import Line, fails
from tests.system.virsh_shapes import (
    BOTH,
    LINE,
    RUNNING,
    created,
    disk_only,
    put_back,
)

PRINTED = (
    Line(
        "snapshot-create-as vm1 --print-xml",
        r"<domainsnapshot>\n</domainsnapshot>\n+",
    ),
    Line(
        "snapshot-create-as vm1 n d --print-xml --live --memspec /m --diskspec vda,file=/x,,y",
        r"<domainsnapshot>\n  <name>n</name>\n  <description>d</description>\n"
        r"  <memory file='/m'/>\n  <disks>\n    <disk name='vda'>\n      <source file='/x,y'/>\n"
        r"    </disk>\n  </disks>\n</domainsnapshot>\n+",
    ),
    Line(
        "snapshot-create-as vm1 n d vda,snapshot=no vdb,stype=block,file=/dev/x --print-xml",
        r"(?s:.*)<disk name='vda' snapshot='no'/>\n(?s:.*)"
        r"<disk name='vdb' type='block'>\n      <source dev='/dev/x'/>(?s:.*)",
    ),
)

REFUSED = (
    fails("snapshot-create vm1 --current", "--current"),
    fails("snapshot-create-as vm1 x --quiesce", "disk-only"),
    fails("snapshot-create-as vm1 x --disk-only --quiesce", "agent"),
    fails(
        "snapshot-create-as vm1 x --disk-only --live",
        "live snapshot creation is supported only during full system snapshots",
    ),
    fails(
        "snapshot-create-as vm1 x --disk-only --memspec {dir}/m",
        "memory state cannot be saved with offline or disk-only snapshot",
    ),
    fails("snapshot-create-as vm2 x --live", "vm2 is shut off"),
    fails("snapshot-create-as vm2 x --disk-only", "vm2 is shut off"),
    fails(
        "snapshot-create-as vm1 x --memspec {dir}/m,snapshot=no",
        "memory filename '{dir}/m' requires external snapshot",
    ),
    fails("snapshot-create-as vm1 x --memspec {dir}/m,snapshot=internal", "external"),
    fails("snapshot-create-as vm1 x --memspec snapshot=internal", "external"),
    fails("snapshot-create-as vm1 x --memspec snapshot=external", "require a filename"),
    fails("snapshot-create-as vm1 x --memspec snapshot=manual", "not supported"),
    fails("snapshot-create-as vm1 x --memspec file=m", "must be absolute"),
    fails("snapshot-create-as vm1 x --memspec m", "unable to parse memspec: m"),
    fails("snapshot-create-as vm1 x --memspec file=/m,x=1", "unable to parse memspec: file=/m,x=1"),
    fails("snapshot-create-as vm1 x --diskspec vda,x=1", "unable to parse diskspec: vda,x=1"),
    fails("snapshot-create-as vm1 x --diskspec vda,file=/a,file=/b", "unable to parse diskspec"),
    fails("snapshot-create-as vm1 x --diskspec vda,stype=net", "Unknown storage type"),
    fails("snapshot-create-as vm1 x --diskspec vda,file=x.qcow2", "must be absolute"),
    fails("snapshot-create-as vm1 x --diskspec vda,snapshot=internal", "external only, by design"),
    fails("snapshot-create-as vm1 x --diskspec vda,driver=raw", "unsupported"),
    fails("snapshot-create-as vm1 x --diskspec vda,driver=qed", "qed"),
    fails("snapshot-create-as vm1 x --diskspec vda --diskspec vda", "disk 'vda' specified twice"),
    fails("snapshot-create-as vm1 x --diskspec vdz", "no disk named 'vdz'"),
    fails("snapshot-create-as vm1 x --diskspec vda,snapshot=no,file={dir}/x", "external"),
    fails(
        "snapshot-create-as vm1 x '' vda,snapshot=no vdb,snapshot=no --disk-only",
        "disk-only snapshots require at least one disk to be selected for snapshot",
    ),
    fails("snapshot-create-as vm1 x --diskspec vda,file={base}", "already exists"),
    fails("snapshot-create-as vm1 x --reuse-external --diskspec vda,file={dir}/none", "{dir}/none"),
    fails("snapshot-create-as vm1 x --diskspec vda,stype=block,file={dir}/none", "{dir}/none"),
    fails("snapshot-create-as vm1 x --diskspec vda,stype=block,file={base}", "block device"),
    fails("snapshot-create-as vm1 x --memspec {base}", "exists"),
    fails("snapshot-create-as vm1 x --disk-only --no-metadata --diskspec vdz", "vdz"),
    fails("snapshot-create-as vm1 x --no-metadata", "memory"),
    fails("snapshot-create-as vm1 a/b", "a/b"),
    fails("snapshot-create-as vm1 .a", "'.a'"),
    fails("snapshot-create-as vm1 x --strategy background --disk-only", "disk-only"),
    fails("snapshot-create vm1 {dir}/none", "Failed to open file '{dir}/none'"),
    fails("snapshot-create vm1 {file}", "XML|xml", input="no xml"),
    fails("snapshot-create vm1 {file}", "bogus", input="<domainsnapshot><bogus/></domainsnapshot>"),
    *(
        fails(
            "snapshot-create vm1 {file}",
            says,
            input=f"<domainsnapshot>{words}</domainsnapshot>",
        )
        for words, says in (
            ("<memory snapshot='external'/>", "require a filename"),
            ("<memory snapshot='manual'/>", "not supported"),
            ("<memory snapshot='no' file='/m'/>", "requires external snapshot"),
            ("<memory snapshot='internal'/>", "external"),
            ("<memory file='m'/>", "must be absolute"),
            ("<disks><disk name='vda' snapshot='internal'/></disks>", "external only, by design"),
            ("<disks><disk name='vda'/><disk name='vda'/></disks>", "specified twice"),
            ("<disks><disk name='vdz'/></disks>", "no disk named 'vdz'"),
            ("<disks><disk name='vda'><source file='x'/></disk></disks>", "must be absolute"),
            ("<disks><disk name='vda' type='volume'/></disks>", "unsupported disk snapshot type"),
            ("<disks><disk name='vda' type='dir'/></disks>", "unsupported disk snapshot type"),
            ("<name>a/b</name>", "a/b"),
        )
    ),
    fails("snapshot-create-as vm1 x --nonsense", "--nonsense"),
    Line(
        "snapshot-create-as vm1 x --disk-only --diskspec vdb,snapshot=manual --hold-limit 0.2",
        r"The guest stands still (?s:.*)error: VM vm1 was held for 0.2 s (?s:.*) vdb(?s:.*)",
        status=1,
        stops=True,
    ),
)

TAKEN = (
    created("snapshot-create-as vm1 s1", "s1"),
    created("snapshot-create-as --domain vm1 --name s2 --description words --atomic", "s2"),
    created("snapshot-create-as vm1 s3 'more words' --live", "s3"),
    disk_only("snapshot-create-as vm1 d1 --disk-only", "d1"),
    disk_only("snapshot-create-as vm1 d2 --disk-only --atomic --diskspec vdb,snapshot=no", "d2",
              moves="vda"),
    disk_only("snapshot-create-as vm1 d3 '' vda,file={dir}/d3.qcow2 vdb,file={dir}/b,,3.qcow2 "
              "--disk-only", "d3"),
    created("snapshot-create-as vm1 m1 --live --memspec {dir}/m1.img --diskspec "
            "vda,snapshot=external,driver=qcow2,file={dir}/m1.qcow2", "m1"),
    disk_only("snapshot-create vm1 --disk-only --xmlfile {file}", "x1", origin=" from '{file}'",
              input="<domainsnapshot><name>x1</name><description>of a file</description>"
              "<disks><disk name='vda'><source file='{dir}/x1.qcow2'/></disk></disks>"
              "</domainsnapshot>"),
    fails("snapshot-create-as vm1 s1", "already"),
    fails("snapshot-create-as vm1 s1 --disk-only", "already"),
    fails("snapshot-create-as vm1 x --diskspec vda,file={dir}/d3.qcow2", "exists"),
    fails("snapshot-create-as vm1 x --memspec {dir}/m1.img", "exists"),
    Line("snapshot-create-as vm1 n1 --disk-only --no-metadata",
         r"Domain snapshot n1 created\n", moves=BOTH, notes=True),
    Line("domjobinfo vm1 --completed",
         rf"Job type: +Completed\nOperation: +Snapshot\nTime elapsed: +\d+ +ms\n(?:{LINE})+"),
    disk_only("snapshot-create-as vm1 r1 --disk-only --reuse-external --diskspec "
              "vda,file={dir}/r1.qcow2 --diskspec vdb,snapshot=no", "r1", moves="vda",
              first="{qemu_img} create -q -f qcow2 -F qcow2 -b {vda} {dir}/r1.qcow2"),
    fails("snapshot-create-as vm1 x --disk-only --reuse-external --diskspec "
          "vda,file={dir}/r2.qcow2 --diskspec vdb,snapshot=no", "r2.qcow2",
          first="{qemu_img} create -q -f qcow2 {dir}/r2.qcow2 8M"),
    Line("snapshot-delete vm1 r1", r"Domain snapshot r1 deleted\n", drops="r1", current="x1",
         moves="vda", notes=True),
    Line("domstate vm1 --reason", r"running \(unpaused\)\n"),
    *(
        step
        for words in ("snapshot-create vm1 --disk-only", "snapshot-create vm1 --atomic --validate",
                      "snapshot-create-as vm1 --live --validate")
        for step in (
            created(words, "TIME", says=r"Domain snapshot [0-9TZ.]+ created\n",
                    stops="disk" not in words),
            Line("snapshot-delete vm1 --current", r"Domain snapshot [0-9TZ.]+ deleted\n",
                 drops="TIME", current="x1", moves=BOTH, notes=True),
        )
    ),
    Line("domjobinfo vm1 --completed --keep-completed",
         rf"Job type: +Completed\nOperation: +Snapshot delete\n(?:{LINE})+"),
    Line("list --with-snapshot --name", r"vm1\n"),
)  # fmt: skip

EDITED = (
    Line(
        "snapshot-edit vm1 d1",
        r"Snapshot d1 XML configuration not changed\.\n",
        editor="true",
    ),
    Line(
        "snapshot-edit vm1 s2",
        r"Snapshot s2 edited\.\n",
        editor="sed -i 's|<description>words<|<description>other words<|'",
    ),
    Line("snapshot-info vm1 s2", r"(?s:.*)Description: +other words\n(?s:.*)"),
    fails(
        "snapshot-edit vm1 d1",
        "Must use --rename or --clone to change d1 to d9",
        editor="sed -i 's|^  <name>d1<|  <name>d9<|'",
    ),
    Line(
        "snapshot-edit vm1 d1 --rename",
        r"Snapshot d1 renamed to d9\.\n",
        editor="sed -i 's|^  <name>d1<|  <name>d9<|'",
        adds="d9",
        drops="d1",
    ),
    Line("snapshot-parent vm1 d2", r"d9\n"),
    fails("snapshot-edit vm1 d9 --rename --clone", "mutually exclusive"),
    fails("snapshot-edit vm1 d9", "editor", editor="false"),
    fails("snapshot-create vm1 --redefine", ""),
    *(
        fails(
            f"snapshot-create vm1 {{file}} --redefine --{flag}",
            f"--redefine and --{flag} are mutually exclusive",
        )
        for flag in ("no-metadata", "halt", "live")
    ),
    fails(
        "snapshot-create vm1 {file} --redefine --disk-only",
        "disk-only flag for snapshot s1 requires disk-snapshot state",
        change=("s1", "s1", "s1"),
    ),
    *(
        fails("snapshot-create vm1 {file} --redefine", says, change=("s1", old, new))
        for says, old, new in (
            ("uuid|UUID", "<uuid>6695", "<uuid>7795"),
            ("state", "<state>running</state>", ""),
            ("state|disk-only", "<state>running</state>", "<state>disk-snapshot</state>"),
            ("name", "<name>s1</name>", ""),
            ("creation", "<creationTime>", "<creationTime>x"),
        )
    ),
    fails(
        "snapshot-create vm1 {file} --redefine",
        "parent",
        change=("s1", "</name>", "</name><parent><name>s1</name></parent>"),
    ),
    fails(
        "snapshot-create vm1 {file} --redefine",
        "gone",
        change=("s1", "</name>", "</name><parent><name>gone</name></parent>"),
    ),
    fails(
        "snapshot-create vm1 {file} --redefine",
        "s2|circle|cycle",
        change=("s1", "</name>", "</name><parent><name>s2</name></parent>"),
    ),
    Line(
        "snapshot-create vm1 {file} --redefine",
        r"Domain snapshot s1 created from '{file}'\n",
        change=("s1", "</name>", "</name><description>defined again</description>"),
    ),
    Line("snapshot-info vm1 s1", r"(?s:.*)Description: +defined again\n(?s:.*)"),
    Line(
        "snapshot-create vm1 {file} --redefine --current",
        r"Domain snapshot s1 created from '{file}'\n",
        current="s1",
    ),
    Line("snapshot-current vm1 x1", r"Snapshot x1 set as current\n", current="x1"),
)

PAUSED = (
    Line("suspend vm1", r"Domain 'vm1' suspended\n", state="paused (user)", stops=True),
    disk_only("snapshot-create-as vm1 p1 --disk-only", "p1"),
    disk_only("snapshot-create-as vm1 p2 --disk-only --quiesce", "p2"),
    Line("snapshot-info vm1 p2", r"(?s:.*)Consistency: +paused\n(?s:.*)"),
    Line("domstate vm1 --reason", r"paused \(user\)\n"),
    Line("resume vm1", r"Domain 'vm1' resumed\n", state=RUNNING),
)

DELETED = (
    Line("snapshot-delete vm1 p1", r"Domain snapshot p1 deleted\n", drops="p1", notes=True),
    Line("snapshot-parent vm1 p2", r"x1\n"),
    Line(
        "snapshot-delete vm1 --current",
        r"Domain snapshot p2 deleted\n",
        drops="p2",
        current="x1",
        moves=BOTH,
        notes=True,
    ),
    Line(
        "snapshot-delete vm1 d2 --metadata",
        r"Domain snapshot d2 deleted\n",
        drops="d2",
        notes=True,
    ),
    Line("snapshot-parent vm1 d3", r"d9\n"),
    fails("snapshot-delete vm1 s1 --children --children-only", "mutually exclusive"),
    fails("snapshot-delete vm1 d2", "no snapshot 'd2'"),
)

REVERTED = (
    fails("snapshot-revert vm1 s1 --running --paused", "mutually exclusive"),
    fails("snapshot-revert vm1 s1 --reset-nvram", "nvram"),
    put_back("snapshot-revert vm1 s2", "s2", adds="before-s2"),
    Line("snapshot-list vm1 --tree --from x1", r"x1\n  \|\n  \+- before-s2-[0-9a-f]{8}\n\n"),
    put_back("snapshot-revert vm1 --snapshotname s1 --paused --discard", "s1",
             state="paused (from snapshot)"),
    Line("resume vm1", r"Domain 'vm1' resumed\n", state=RUNNING),
    created("snapshot-create-as vm1 b1", "b1"),
    Line("snapshot-list vm1 --from s1 --name", r"b1\ns2\n"),
    Line("snapshot-list vm1 --tree", r"s1\n  \|\n  \+- b1\n  \+- s2\n(?s:.*)"),
    put_back("snapshot-revert vm1 --current --running --force --discard", "b1"),
    Line("snapshot-delete vm1 d3 --children-only", r"Domain snapshot d3 children deleted\n",
         drops="m1 x1 before-s2", notes=True),
    Line("snapshot-delete vm1 s2 --children", r"Domain snapshot s2 deleted\n",
         drops="s2 s3 d9 d3", notes=True),
    Line("snapshot-list vm1 --tree", r"s1\n  \|\n  \+- b1\n\n"),
)  # fmt: skip

HALTED = (
    created(
        "snapshot-create-as vm1 h1 --halt", "h1", state="shut off (from snapshot)", moves=""
    ),
    Line("domstate vm1 --reason", r"shut off \(from snapshot\)\n"),
    Line("list --name", r""),
    Line("snapshot-list vm1 --current --tree", r"h1\n\n"),
    fails("snapshot-create-as vm1 x", "shut off"),
    fails("snapshot-create-as vm1 x --live", "shut off"),
    fails("suspend vm1", "shut off"),
    put_back("snapshot-revert vm1 h1", "h1"),
    disk_only("snapshot-create-as vm1 h2 --disk-only --halt", "h2",
              state="shut off (from snapshot)", moves=""),
    put_back("snapshot-revert vm1 h2 --running", "h2"),
)  # fmt: skip

HEARD = (
    "event 'lifecycle' for domain 'vm1': Suspended Paused",
    "event 'lifecycle' for domain 'vm1': Resumed Unpaused",
    "event 'lifecycle' for domain 'vm1': Stopped Snapshot",
    "event 'lifecycle' for domain 'vm1': Resumed Snapshot",
    "event 'lifecycle' for domain 'vm1': Started Snapshot",
    "event 'snapshot' for domain 'vm1': created s1",
    "event 'snapshot' for domain 'vm1': created d1",
    "event 'snapshot' for domain 'vm1': redefined s1 defined again",
    "event 'snapshot' for domain 'vm1': redefined d9 renamed from d1",
    "event 'snapshot' for domain 'vm1': redefined x1 set as current",
    "event 'snapshot' for domain 'vm1': reverted s2",
    "event 'snapshot' for domain 'vm1': deleted p1",
    "event 'snapshot' for domain 'vm1': deleted m1",
    "event 'snapshot' for domain 'vm1': deleted before-s2-[0-9a-f]{8}",
    r"event 'snapshot' for domain 'vm1': failed x .*",
    r"event 'job' for domain 'vm1': saving s1 .*%",
    r"event 'job' for domain 'vm1': done s1.*",
)
"""Lines that `event --all --loop` prints meanwhile, among others."""

NOT_HEARD = (
    "event 'lifecycle' for domain 'vm1': Shutdown .*",
    "event 'lifecycle' for domain 'vm1': Stopped (?!Snapshot).*",
    "event 'snapshot' for domain 'vm1': failed (?:s2|d9|m1|x1|b1|h2).*",
)
"""No guest shuts down or ends by itself, only by a revert or --halt; nothing fails that is done."""

IN_ORDER = Line("snapshot-fsck vm1", r"(?s:.*)Domain vm1 is in order(?s:.*)")
"""Not virsh's, but what it says must hold after every line."""

LINES = (
    *(*VMS_BEFORE, *NOTHING_YET, *PRINTED, *REFUSED, IN_ORDER, *TAKEN, IN_ORDER, *LISTED, *SHOWN),
    *(*EDITED, IN_ORDER, *PAUSED, *DELETED, IN_ORDER, *REVERTED, IN_ORDER, *HALTED, IN_ORDER),
    *LISTENED,
)
