// One boot of several: says whether memory is as it should be at a start, takes a byte from the console, says it, and
// resets; or powers off when it is a 'q'.
#include "common.h"

        begin
        lea     data(%rip), %rbx
        cmpl    $0x11223344, (%rbx)
        jne     dirty
        cmpq    $0, 0x2000000
        jne     dirty
        print   "clean "
        jmp     1f
dirty:  print   "dirty "
1:      movl    $0x55667788, (%rbx)
        movq    $-1, 0x2000000
        call    getc
        mov     %al, %bl
        mov     $COM1, %edx
        out     %al, (%dx)
        mov     $10, %al
        out     %al, (%dx)
        cmp     $'q', %bl
        je      2f
        reset
2:      power_off

        .data
data:   .long   0x11223344
        routines
