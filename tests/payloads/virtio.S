// Drives each virtio-mmio device as a bad driver does: the first queue lies outside of memory, so that no device can start,
// and it writes to the beginning of the configuration space, which is not its to change.
#include "common.h"

        begin
        lea     gigabytes(%rip), %rsi
        call    map
        mov     $0xc0001000, %ebx
device: mov     (%rbx), %eax
        cmp     $0x74726976, %eax               // "virt"
        jne     done
        movl    $0, 0x70(%rbx)                  // the status
        movl    $1, 0x70(%rbx)
        movl    $3, 0x70(%rbx)
        movl    $1, 0x24(%rbx)                  // VERSION_1, and nothing else
        movl    $1, 0x20(%rbx)
        movl    $11, 0x70(%rbx)
        movl    $0, 0x30(%rbx)                  // the queue, its size, its descriptors
        movl    $16, 0x38(%rbx)
        movl    $0, 0x80(%rbx)
        movl    $0xff, 0x84(%rbx)
        movl    $1, 0x44(%rbx)
        movl    $15, 0x70(%rbx)
        movl    $1, 0x100(%rbx)
        mov     0x70(%rbx), %eax
        test    $0x40, %eax                     // DEVICE_NEEDS_RESET
        jz      wrong
        print   "refused\n"
        add     $0x1000, %rbx
        jmp     device
done:   print   "end\n"
        power_off

wrong:  print   "started\n"
        power_off

        .section .rodata
gigabytes:
        .byte   0, 3, 0xff
        routines
