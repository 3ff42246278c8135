/*
 * A guest's boot marks: bytes to Husk's mark port (docs/machine.md).
 *
 * As process 1 it is an init that does nothing else: it marks that it has been started (0) and is done (1), and powers off.
 * Otherwise its argument is a digit, which it marks. A kernel without iopl(2) lets it write through /dev/port; without that
 * either, it says so on the console.
 */
#include <sys/syscall.h>

#define MARK_PORT 0x604
#define O_WRONLY 1
#define LINUX_REBOOT_MAGIC1 0xfee1dead
#define LINUX_REBOOT_MAGIC2 672274793
#define LINUX_REBOOT_CMD_POWER_OFF 0x4321fedc

	.globl _start
_start:
	/* From %ebx to %ebp is marked. */
	xor %ebx, %ebx
	mov $1, %ebp
	mov $SYS_getpid, %eax
	syscall
	mov %eax, %r12d
	dec %eax
	jz open
	mov 16(%rsp), %rax
	test %rax, %rax
	jz end
	movzbl (%rax), %ebx
	sub $'0', %ebx
	mov %ebx, %ebp

open:
	mov $SYS_iopl, %eax
	mov $3, %edi
	syscall
	/* %r13: 0, ports are open; otherwise one more than the descriptor to write to. */
	mov %eax, %r13d
	test %eax, %eax
	jz mark
	mov $SYS_open, %eax
	lea path(%rip), %rdi
	mov $O_WRONLY, %esi
	syscall
	test %eax, %eax
	js say
	lea 1(%rax), %r13d

mark:
	mov %ebx, %eax
	test %r13d, %r13d
	jnz write
	mov $MARK_PORT, %dx
	out %al, %dx
	jmp marked
write:
	push %rax
	lea -1(%r13), %edi
	mov %rsp, %rsi
	mov $1, %edx
	mov $MARK_PORT, %r10d
	mov $SYS_pwrite64, %eax
	syscall
	pop %rcx
	dec %eax
	jnz say
marked:
	inc %ebx
	cmp %ebp, %ebx
	jbe mark
	jmp end

say:
	cmp $1, %r12d
	jne end
	mov $SYS_write, %eax
	mov $1, %edi
	lea text(%rip), %rsi
	mov $(path - text), %edx
	syscall

end:
	cmp $1, %r12d
	jne exit
	mov $SYS_reboot, %eax
	mov $LINUX_REBOOT_MAGIC1, %edi
	mov $LINUX_REBOOT_MAGIC2, %esi
	mov $LINUX_REBOOT_CMD_POWER_OFF, %edx
	syscall
	/* Were process 1 to end, the kernel would panic. */
wait:
	mov $SYS_pause, %eax
	syscall
	jmp wait

exit:
	mov $SYS_exit, %eax
	xor %edi, %edi
	syscall

text:
	.ascii "husk: init marks\n"
path:
	.asciz "/dev/port"
	.section .note.GNU-stack, "", @progbits
