# The "pages" guest: a boot sector that dirties all of RAM and checks what it finds.
#
# For ever: counter += 1; from 2 MiB up to the last MiB of RAM, page by page: check that the
# page still holds what the last pass left there, then write {tag, counter} at its start.
# So over rising addresses the counter changes at most once in any image of one instant,
# from n to n-1. On the first serial port, one line each:
#
#   PASS <counter>    a pass is complete
#   TORN <address>    this page did not hold its tag and the last counter
#
# Numbers are eight hexadecimal digits. pages.py knows the layout and the knob.

        .set    BASE, 2 << 20           # below: this code, its stack, the firmware's data
        .set    TOP, 0xc0000            # in pages: 3 GiB, the first address that may be a device
        .set    PAGE, 4096
        .set    TAG, 0x5a9e0001         # a page's tag is its address with these bits flipped
        .set    COM1, 0x3f8

        .code16
        .globl  _start
_start: jmp     real
        .org    4
spin:   .long   0                       # the knob: turns of an idle loop after each page

real:   cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp

        # RAM above 16 MiB, in units of 64 KiB (BX and DX); there must be some
        movw    $0xe801, %ax
        int     $0x15
        movzwl  %dx, %ebp
        addl    $256, %ebp              # the first 16 MiB
        shll    $4, %ebp                # in pages
        # The firmware keeps a little at the top, among it queues of the boot disk, which
        # QEMU looks at again on every `cont`: so only up to a whole MiB
        andl    $~255, %ebp
        cmpl    $TOP, %ebp
        jbe     1f
        movl    $TOP, %ebp
1:      shll    $12, %ebp               # %ebp: end of RAM

        inb     $0x92, %al              # open address line 20
        orb     $2, %al
        outb    %al, $0x92
        cli                             # the firmware may have enabled them again
        lgdt    table
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        xorl    %ebx, %ebx              # %ebx: counter

        # A page nobody has written yet may hold anything: begin with counter 0 everywhere
        movl    $BASE, %edi             # %edi: address of the page
clean:  movl    %edi, %eax
        xorl    $TAG, %eax
        movl    %eax, (%edi)
        movl    %ebx, 4(%edi)
        addl    $PAGE, %edi
        cmpl    %ebp, %edi
        jb      clean

pass:   incl    %ebx
        movl    $BASE, %edi
page:   leal    -1(%ebx), %edx
        movl    %edi, %eax
        xorl    $TAG, %eax
        cmpl    %edx, 4(%edi)
        jne     torn
        cmpl    %eax, (%edi)
        je      write
torn:   pushl   %eax
        movl    $torn_text, %esi
        movl    %edi, %edx
        call    line
        popl    %eax
write:  movl    %eax, (%edi)            # the tag only changes if it was wrong, so the one
        movl    %ebx, 4(%edi)           # store that counts is the counter's: never half done
        movl    spin, %ecx
        jecxz   2f
1:      loop    1b
2:      addl    $PAGE, %edi
        cmpl    %ebp, %edi
        jb      page

        movl    $pass_text, %esi
        movl    %ebx, %edx
        call    line
        jmp     pass

# Prints the five characters at %esi, %edx in hexadecimal and a line feed.
line:   movl    $5, %ecx
1:      lodsb
        call    put
        loop    1b
        movl    $8, %ecx
2:      roll    $4, %edx
        movb    %dl, %al
        andb    $15, %al
        cmpb    $10, %al
        jb      3f
        addb    $'a' - '0' - 10, %al
3:      addb    $'0', %al
        call    put
        loop    2b
        movb    $'\n', %al              # falls through

# Sends %al once the port can take it. Changes %eax.
put:    pushl   %edx
        movb    %al, %ah
        movw    $COM1 + 5, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        movb    %ah, %al
        movw    $COM1, %dx
        outb    %al, %dx
        popl    %edx
        ret

pass_text: .ascii "PASS "
torn_text: .ascii "TORN "

        .balign 8
descriptors:
        .quad   0
        .quad   0x00cf9a000000ffff      # 8: code, all 4 GiB
        .quad   0x00cf92000000ffff      # 16: data, all 4 GiB
table:  .word   . - descriptors - 1
        .long   descriptors

        .org    510
        .word   0xaa55
