// Listens to the keyboard without interrupts: prints the eight bytes that come for Ctrl-Alt-Del, then resets.
#include "common.h"

        begin
        out8    0x60, 0xf4                      // send keys
        call    key
        print   "up\n"
        mov     $8, %ebx
1:      call    key
        movzbl  %al, %eax
        call    puthex
        dec     %ebx
        jnz     1b
        reset

key:    in      $0x64, %al
        test    $1, %al
        jz      key
        in      $0x60, %al
        ret
        routines
