// What the payload kernels share. Each is entered in 64-bit mode with RSI at Linux's boot_params, memory mapped one to
// one, and interrupts off; each has its own stack.
//
// Ports and values are written out here, not taken from Husk: they are what a guest relies on.

#define COM1            0x3f8
#define LSR             (COM1 + 5)
#define I8042_COMMAND   0x64
#define PVPANIC         0x505
#define SLEEP_CONTROL   0x600
#define ACPI_RESET      0x602
#define EVENTS          0x603
#define SLP_EN_S5       0x34

.macro out8 port, value
        mov     $\port, %edx
        mov     $\value, %al
        out     %al, (%dx)
.endm

// Print the text. Changes RAX, RCX, RDX, RSI.
.macro print text
        lea     text_\@(%rip), %rsi
        mov     $(text_end_\@ - text_\@), %ecx
        mov     $COM1, %edx
        cld
        rep outsb
        .pushsection .rodata
text_\@:
        .ascii  "\text"
text_end_\@:
        .popsection
.endm

.macro power_off
        out8    SLEEP_CONTROL, SLP_EN_S5
7:      hlt
        jmp     7b
.endm

.macro reset
        out8    I8042_COMMAND, 0xfe
7:      hlt
        jmp     7b
.endm

.macro begin
        .text
        .code64
        .globl  _start
_start: lea     stack_top(%rip), %rsp
        mov     %rsi, %rbp              // boot_params
.endm

.macro routines
        .text
        .code64
// The byte in AL, after the guest has looked for it 16 times or more: then Husk takes it for a guest that polls.
getc:   mov     $LSR, %edx
1:      in      (%dx), %al
        test    $1, %al
        jz      1b
        mov     $COM1, %edx
        in      (%dx), %al
        ret

// Print RAX as 16 hexadecimal digits and a blank. Changes RAX, RCX, RDX, RDI.
puthex: mov     %rax, %rdi
        mov     $16, %ecx
        mov     $COM1, %edx
1:      rol     $4, %rdi
        mov     %edi, %eax
        and     $15, %eax
        cmp     $10, %eax
        jb      2f
        add     $39, %eax               // 'a' - '0' - 10
2:      add     $48, %eax
        out     %al, (%dx)
        dec     %ecx
        jnz     1b
        mov     $32, %al
        out     %al, (%dx)
        ret

// Map the gigabytes of the list of bytes at RSI, which 0xff ends, to themselves (six at most, below 512), and nothing
// else. Changes RAX, RBX, RCX, RDX, RSI, RDI.
map:    lea     pdpt + 3(%rip), %rax
        mov     %rax, pml4(%rip)
        lea     pdpt(%rip), %rbx
        lea     directories(%rip), %rdi
1:      movzbl  (%rsi), %ecx
        inc     %rsi
        cmp     $0xff, %ecx
        je      3f
        lea     3(%rdi), %rax
        mov     %rax, (%rbx,%rcx,8)
        mov     %rcx, %rax
        shl     $30, %rax
        or      $0x83, %rax             // pages of 2 MiB
        mov     $512, %edx
2:      mov     %rax, (%rdi)
        add     $8, %rdi
        add     $0x200000, %rax
        dec     %edx
        jnz     2b
        jmp     1b
3:      lea     pml4(%rip), %rax
        mov     %rax, %cr3
        ret

        .bss
        .balign 4096
pml4:   .space  4096
pdpt:   .space  4096
directories:
        .space  6 * 4096
        .space  4096
stack_top:
.endm
