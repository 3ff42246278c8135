// Says on the console what the Linux boot protocol gave it: magic, command line, memory map, processors, initrd.
#include "common.h"

        begin
        lea     gigabytes(%rip), %rsi           // the initrd may be anywhere below 4 GiB
        call    map
        cmpl    $0x53726448, 0x202(%rbp)        // "HdrS"
        jne     wrong
        cmpw    $0xaa55, 0x1fe(%rbp)
        jne     wrong
        cmpb    $0, 0x210(%rbp)                 // type_of_loader
        je      wrong
        print   "linux ok\n"

        print   "cmdline "
        mov     0x228(%rbp), %esi               // cmd_line_ptr
        mov     $COM1, %edx
1:      lodsb
        test    %al, %al
        jz      2f
        out     %al, (%dx)
        jmp     1b
2:      print   "\n"

        movzbl  0x1e8(%rbp), %ebx               // e820_entries
        lea     0x2d0(%rbp), %r12
3:      print   "e820 "
        mov     (%r12), %rax
        call    puthex
        mov     8(%r12), %rax
        call    puthex
        mov     16(%r12), %eax
        call    puthex
        print   "\n"
        add     $20, %r12
        dec     %ebx
        jnz     3b

        // RSDP -> XSDT -> MADT: enabled local APICs (type 0) and local x2APICs (type 9).
        mov     0x70(%rbp), %rax                // acpi_rsdp_addr
        mov     24(%rax), %rbx                  // XSDT
        mov     4(%rbx), %ecx
        add     %rbx, %rcx                      // its end
        add     $36, %rbx
4:      cmp     %rcx, %rbx
        jae     wrong
        mov     (%rbx), %rax
        add     $8, %rbx
        cmpl    $0x43495041, (%rax)             // "APIC"
        jne     4b
        mov     4(%rax), %ecx
        add     %rax, %rcx
        add     $44, %rax
        xor     %ebx, %ebx
5:      cmp     %rcx, %rax
        jae     8f
        movzbl  1(%rax), %edx
        cmpb    $0, (%rax)
        jne     6f
        mov     4(%rax), %esi
        jmp     7f
6:      xor     %esi, %esi
        cmpb    $9, (%rax)
        jne     7f
        mov     8(%rax), %esi
7:      and     $1, %esi
        add     %esi, %ebx
        add     %rdx, %rax
        jmp     5b
8:      print   "cpus "
        mov     %rbx, %rax
        call    puthex
        print   "\n"

        print   "initrd "
        mov     0xc4(%rbp), %ecx                // ext_ramdisk_size
        shl     $32, %rcx
        mov     0x21c(%rbp), %eax
        or      %rax, %rcx
        mov     0xc0(%rbp), %esi                // ext_ramdisk_image
        shl     $32, %rsi
        mov     0x218(%rbp), %eax
        or      %rax, %rsi
        mov     $COM1, %edx
        cld
        rep outsb
        print   "\nend\n"
        power_off

wrong:  print   "wrong\n"
        power_off
        .section .rodata
gigabytes:
        .byte   0, 1, 2, 3, 0xff
        routines
