// Says on the console what PVH gave it: magic, command line, memory map, module. 32 bits, no paging.
#include "common.h"

        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 4, 18                        // XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .balign 4
        .long   start32

        .macro  say text
        mov     $text_\@, %esi
        mov     $(text_end_\@ - text_\@), %ecx
        call    write32
        .pushsection .rodata
text_\@:
        .ascii  "\text"
text_end_\@:
        .popsection
        .endm

        .text
        .code32
start32:
        mov     $stack_top, %esp
        mov     %ebx, %ebp                      // hvm_start_info
        cmpl    $0x336ec578, (%ebp)
        jne     wrong
        say     "pvh ok\n"
        say     "cmdline "
        mov     24(%ebp), %esi
        mov     $COM1, %edx
1:      lodsb
        test    %al, %al
        jz      2f
        out     %al, (%dx)
        jmp     1b
2:      say     "\n"
        say     "initrd "
        cmpl    $0, 12(%ebp)                    // nr_modules
        je      3f
        mov     16(%ebp), %eax                  // modlist_paddr
        mov     (%eax), %esi
        mov     8(%eax), %ecx
        call    write32
3:      say     "\nend\n"
        mov     $0xfe, %al
        out     %al, $I8042_COMMAND
4:      hlt
        jmp     4b
wrong:  say     "wrong\n"
        jmp     3b

write32:
        mov     $COM1, %edx
        cld
        rep outsb
        ret

        // Entered by the Linux protocol, it says so: a test asks which entry was taken.
        .code64
        .globl  _start
_start: lea     stack_top(%rip), %rsp
        print   "64-bit entry\n"
        power_off

        .bss
        .balign 16
        .space  4096
stack_top:
