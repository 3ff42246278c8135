// Does with its memory from 32 MiB on what the console's bytes say, and answers each with a line:
// d  writes a new number to each of 2560 pages in a row (10 MiB)
// s  writes a new number to every fourth of 10240 pages (40 MiB)
// z  makes the first 64 of them zero, all bytes
// c  says a number that depends on the first word of each of the 10240 pages
// With SMALL they are a tenth as many.
#include "common.h"

#ifdef SMALL
#define COUNT   256
#else
#define COUNT   2560
#endif

#define PAGES   0x2000000

        begin
        xor     %ebx, %ebx
        print   "ready\n"
next:   call    getc
        cmp     $'d', %al
        je      row
        cmp     $'s', %al
        je      some
        cmp     $'z', %al
        je      clear
        cmp     $'c', %al
        je      check
        jmp     next

row:    mov     $4096, %r8d
        jmp     1f
some:   mov     $16384, %r8d
1:      inc     %rbx
        mov     $PAGES, %r12d
        mov     $COUNT, %ecx
2:      add     $0x1e3779b9, %rbx
        mov     %rbx, (%r12)
        add     %r8, %r12
        dec     %ecx
        jnz     2b
        jmp     done

clear:  mov     $PAGES, %edi
        mov     $(64 * 512), %ecx
        xor     %eax, %eax
        cld
        rep stosq
done:   print   "done\n"
        jmp     next

check:  mov     $PAGES, %r12d
        mov     $(4 * COUNT), %ecx
        xor     %eax, %eax
3:      rol     $1, %rax
        add     (%r12), %rax
        add     $4096, %r12
        dec     %ecx
        jnz     3b
        call    puthex
        print   "\n"
        jmp     next
        routines
