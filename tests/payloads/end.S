// Says "go", then comes to one of many ends, chosen when it is assembled.
#include "common.h"

        begin
        print   "go\n"

#if defined(I8042_RESET)
        reset
#elif defined(ACPI_RESET_REGISTER)
        out8    ACPI_RESET, 1
#elif defined(POWER_OFF)
        power_off
#elif defined(WARM_RESET)
        movw    $0x1234, 0x472
        reset
#elif defined(PANIC)
        out8    PVPANIC, 1
#elif defined(TRIPLE_FAULT)
        lidt    nothing(%rip)
        ud2
#elif defined(POWER_BUTTON)
        // Polls for the power button and powers off.
1:      mov     $EVENTS, %edx
        in      (%dx), %al
        test    $1, %al
        jz      1b
        print   "pressed\n"
        power_off
#elif defined(WIDE)
        // Reaches behind the UART's registers, and to where the keyboard controller has none, and powers off.
        mov     $(COM1 + 7), %edx
        in      (%dx), %eax
        out     %eax, (%dx)
        in      (%dx), %ax
        mov     $0x62, %edx
        in      (%dx), %al
        out     %al, (%dx)
        out     %al, (%dx)
        power_off
#elif defined(DEAF)
        // Says that the button was pressed, and goes on.
1:      mov     $EVENTS, %edx
        in      (%dx), %al
        test    $1, %al
        jz      1b
        print   "pressed\n"
        jmp     1b
#elif defined(SPIN)
1:      jmp     1b
#elif defined(JUMP_INTO_HOLE)
        lea     gigabytes(%rip), %rsi
        call    map
        mov     $0xd0000000, %eax
        jmp     *%rax
#elif defined(EMULATION)
        // No KVM emulates a store of the x87 state to device memory.
        lea     gigabytes(%rip), %rsi
        call    map
        mov     $0xd0000000, %eax
        fnstenv (%rax)
#elif defined(PAGE_TABLES_ZEROED) || defined(PAGE_TABLES_ONES) || defined(PAGE_TABLES_GARBAGE)
        mov     %cr3, %rdi
        and     $~0xfff, %rdi
#if defined(PAGE_TABLES_ZEROED)
        xor     %eax, %eax
#elif defined(PAGE_TABLES_ONES)
        mov     $-1, %rax
#else
        mov     $0x5a5a5a5a5a5a5a5b, %rax
#endif
        mov     $(3 * 512), %ecx
        cld
        rep stosq
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     0x2000000, %rax
        ud2
#elif defined(PAGE_TABLES_TO_NOWHERE)
        // All of memory becomes device memory, the code with it.
        mov     %cr3, %rax
        lea     2 * 4096(%rax), %rdi            // the page directory
        mov     $0xd0000083, %eax
        mov     $512, %ecx
        cld
        rep stosq
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     0x2000000, %rax
        ud2
#elif defined(IDT_GARBAGE)
        lidt    garbage(%rip)
        lea     idt(%rip), %rdi
        mov     $0x5a5a5a5a5a5aee5a, %rax
        mov     $512, %ecx
        cld
        rep stosq
        ud2
#elif defined(IDT_OVER_ITSELF)
        // Every fault's handler is the faulting instruction, on a stack that runs through all of memory.
        lea     idt(%rip), %rdi
        lea     fault(%rip), %rax
        mov     $256, %ecx
1:      mov     %ax, (%rdi)
        movw    $0x10, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        mov     %rax, %rbx
        shr     $16, %rbx
        mov     %bx, 6(%rdi)
        movq    $0, 8(%rdi)
        add     $16, %rdi
        dec     %ecx
        jnz     1b
        lidt    garbage(%rip)
        mov     $0x200000, %esp                 // down through page tables and boot data to address 0
fault:  sub     $4096, %rsp
        ud2
#elif defined(GDT_GARBAGE)
        mov     $0x500, %edi
        mov     $-1, %rax
        mov     $4, %ecx
        cld
        rep stosq
        lidt    nothing(%rip)
        mov     $0x18, %eax
        mov     %eax, %ss
        pushq   $0x10
        pushq   $0x1000
        lretq
#elif defined(HALT)
        cli
#else
#error "which end?"
#endif
7:      hlt
        jmp     7b

        .data
gigabytes:
        .byte   0, 3, 0xff
nothing:
        .word   0
        .quad   0
garbage:
        .word   4095
        .quad   idt
        .bss
        .balign 4096
idt:    .space  4096
        routines
