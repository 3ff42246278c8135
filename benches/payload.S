# A payload kernel: an ELF with a PVH note (32-bit entry, prints "h\n" on COM1) and a 64-bit entry (prints "H\n"),
# which then resets the machine through port 0x64, or with -DSTAY halts (to be looked at while it lives).
#   gcc -nostdlib -static -Wl,-Ttext=0x1000000 -Wl,--build-id=none -o payload.elf payload.S
.section .note.pvh,"a",@note
 .align 4
 .long 4, 4, 18
 .asciz "Xen"
 .align 4
 .long start32
.text
.code64
.globl _start
_start:
 mov $0x3f8,%edx
 mov $'H',%al
 out %al,(%dx)
 mov $10,%al
 out %al,(%dx)
#ifndef STAY
 mov $0xfe,%al
 out %al,$0x64
#endif
1: hlt
 jmp 1b
.code32
start32:
 mov $0x3f8,%edx
 mov $'h',%al
 out %al,(%dx)
 mov $10,%al
 out %al,(%dx)
#ifndef STAY
 mov $0xfe,%al
 out %al,$0x64
#endif
1: hlt
 jmp 1b
