// Says by Firecracker's boot timer that it is up.
#include "common.h"

        begin
        lea     gigabytes(%rip), %rsi
        call    map
        mov     $0xc0000000, %ebx
        movb    $122, (%rbx)
        movb    $123, (%rbx)
        movb    $123, (%rbx)
        print   "up\n"
        power_off

        .section .rodata
gigabytes:
        .byte   0, 3, 0xff
        routines
