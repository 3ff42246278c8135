// Counts, in a register and in memory that nothing else has touched, and says each number; "wrong" when the two differ.
#include "common.h"

        begin
        xor     %ebx, %ebx
        mov     $0x3000000, %r12d
1:      inc     %rbx
        incq    (%r12)
        cmp     (%r12), %rbx
        jne     2f
        mov     %rbx, %rax
        call    puthex
        print   "\n"
        jmp     1b
2:      print   "wrong\n"
        power_off
        routines
