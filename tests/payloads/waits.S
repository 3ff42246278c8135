// Waits until it is another VM than it was: until its VM generation ID changes. Then it says so, and halts for good.
#include "common.h"

        begin
        mov     $0xf2000, %r12d
        mov     (%r12), %rbx
        print   "waits\n"
1:      cmp     (%r12), %rbx
        je      1b
        print   "clone\n"
2:      cli
        hlt
        jmp     2b
        routines
