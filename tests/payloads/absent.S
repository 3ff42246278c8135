// Reads and writes every I/O port that has no device, and device memory that has none. Reads must give ones.
#include "common.h"

        begin
        print   "go\n"
        xor     %ebx, %ebx                      // the port
port:   lea     present(%rip), %rsi
1:      mov     (%rsi), %eax                    // first in the low half, last in the high one
        add     $4, %rsi
        test    %eax, %eax
        jz      absent
        movzwl  %ax, %ecx
        shr     $16, %eax
        cmp     %ecx, %ebx
        jb      1b
        cmp     %eax, %ebx
        ja      1b
        jmp     next
absent: mov     %ebx, %edx
        xor     %eax, %eax
        in      (%dx), %al
        cmp     $0xff, %al
        jne     wrong
        mov     $0x34, %al                      // would be a power-off elsewhere
        out     %al, (%dx)
        cmp     $0x1000, %ebx                   // where devices are, in every size
        jae     next
        xor     %eax, %eax
        in      (%dx), %ax
        cmp     $0xffff, %ax
        jne     wrong
        xor     %eax, %eax
        in      (%dx), %eax
        cmp     $0xffffffff, %eax
        jne     wrong
        mov     $0x01fe3401, %eax
        out     %ax, (%dx)
        out     %eax, (%dx)
next:   inc     %ebx
        cmp     $0x10000, %ebx
        jb      port
        print   "ports ok\n"

        lea     gigabytes(%rip), %rsi
        call    map
        lea     holes(%rip), %r12
hole:   mov     (%r12), %rbx
        add     $8, %r12
        test    %rbx, %rbx
        jz      done
        xor     %eax, %eax
        movb    (%rbx), %al
        cmp     $0xff, %al
        jne     wrong
        xor     %eax, %eax
        movw    (%rbx), %ax
        cmp     $0xffff, %ax
        jne     wrong
        movl    (%rbx), %eax
        cmp     $0xffffffff, %eax
        jne     wrong
        xor     %eax, %eax
        movq    (%rbx), %rax
        cmp     $-1, %rax
        jne     wrong
        mov     %rbx, %rax
        movb    %al, (%rbx)
        movw    %ax, (%rbx)
        movl    %eax, (%rbx)
        movq    %rax, (%rbx)
        mov     (%rbx), %rax                    // nothing has stayed
        cmp     $-1, %rax
        jne     wrong
        jmp     hole
done:   print   "memory ok\n"
        power_off

wrong:  mov     %rax, %r13
        print   "wrong: "
        mov     %r13, %rax
        call    puthex
        print   "at "
        mov     %rbx, %rax
        call    puthex
        print   "\n"
        power_off

        .section .rodata
        .balign 8
present:                                        // first, last
        .word   0x20, 0x21, 0x40, 0x43, 0x60, 0x64, 0xa0, 0xa1, 0x3f8, 0x3ff, 0x4d0, 0x4d1, 0x505, 0x505, 0x600, 0x604
        .long   0
gigabytes:
        .byte   0, 1, 2, 3, 4, 63, 0xff
        .balign 8
holes:  .quad   0x20000000, 0x20000001, 0xbffffff8, 0xc0000000, 0xc0000004, 0xcffffffd, 0xd0000800
        .quad   0xfeb00000, 0xff000000, 0xfffffff0, 0xfffffff8, 0x100000000, 0x100001000, 0x13ffffff0
        .quad   0xfc0000000, 0xfffffff00, 0
        routines
