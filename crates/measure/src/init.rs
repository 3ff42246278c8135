//! An init that marks and powers off, so that a kernel alone can be measured.

use husk_arch::layout::MARK_PORT;
use husk_loader::Error;
use husk_loader::initramfs::Archive;

/// Where the program lies in memory.
const BASE: u64 = 0x40_0000;
/// Bytes of an ELF header, and of one program header.
const HEADERS: u64 = 64 + 56;
/// It marks with two bytes to the mark port: 0 when it has been started, 1 when it is done. A kernel without iopl(2) lets it do
/// so through /dev/port; without that either, it says so on the console instead. Then it powers off.
const CODE: [&[u8]; 44] = [
    &[0xb8, 172, 0, 0, 0],                 // mov $SYS_iopl, %eax
    &[0xbf, 3, 0, 0, 0],                   // mov $3, %edi
    &[0x0f, 0x05],                         // syscall
    &[0x85, 0xc0],                         // test %eax, %eax
    &[0x75, 0x0c],                         // jnz port
    &[0x66, 0xba, MARK[0], MARK[1]],       // mov $MARK_PORT, %dx
    &[0x31, 0xc0],                         // xor %eax, %eax
    &[0xee],                               // out %al, %dx
    &[0xff, 0xc0],                         // inc %eax
    &[0xee],                               // out %al, %dx
    &[0xeb, 0x58],                         // jmp end
    &[0xb8, 2, 0, 0, 0],                   // port: mov $SYS_open, %eax
    &[0x48, 0x8d, 0x3d, 0x6d, 0, 0, 0],    // lea path(%rip), %rdi
    &[0xbe, 1, 0, 0, 0],                   // mov $O_WRONLY, %esi
    &[0x0f, 0x05],                         // syscall
    &[0x85, 0xc0],                         // test %eax, %eax
    &[0x78, 0x29],                         // js say
    &[0x89, 0xc7],                         // mov %eax, %edi
    &[0xb8, 18, 0, 0, 0],                  // mov $SYS_pwrite64, %eax
    &[0x48, 0x8d, 0x35, 0x52, 0, 0, 0],    // lea marks(%rip), %rsi
    &[0xba, 1, 0, 0, 0],                   // mov $1, %edx
    &[0x41, 0xba, MARK[0], MARK[1], 0, 0], // mov $MARK_PORT, %r10d
    &[0x0f, 0x05],                         // syscall
    &[0xb8, 18, 0, 0, 0],                  // mov $SYS_pwrite64, %eax
    &[0x48, 0xff, 0xc6],                   // inc %rsi
    &[0x0f, 0x05],                         // syscall
    &[0xff, 0xc8],                         // dec %eax
    &[0x74, 0x18],                         // jz end
    &[0xb8, 1, 0, 0, 0],                   // say: mov $SYS_write, %eax
    &[0xbf, 1, 0, 0, 0],                   // mov $1, %edi
    &[0x48, 0x8d, 0x35, 0x32, 0, 0, 0],    // lea text(%rip), %rsi
    &[0xba, TEXT.len() as u8, 0, 0, 0],    // mov $length, %edx
    &[0x0f, 0x05],                         // syscall
    &[0xb8, 169, 0, 0, 0],                 // end: mov $SYS_reboot, %eax
    &[0xbf, 0xad, 0xde, 0xe1, 0xfe],       // mov $LINUX_REBOOT_MAGIC1, %edi
    &[0xbe, 0x69, 0x19, 0x12, 0x28],       // mov $LINUX_REBOOT_MAGIC2, %esi
    &[0xba, 0xdc, 0xfe, 0x21, 0x43],       // mov $LINUX_REBOOT_CMD_POWER_OFF, %edx
    &[0x0f, 0x05],                         // syscall
    &[0xb8, 34, 0, 0, 0],                  // wait: mov $SYS_pause, %eax
    &[0x0f, 0x05],                         // syscall
    &[0xeb, 0xf7],                         // jmp wait
    &[0, 1],                               // marks:
    b"/dev/port\0",                        // path:
    TEXT.as_bytes(),                       // text:
];
const MARK: [u8; 2] = MARK_PORT.to_le_bytes();
/// A line that holds [`crate::console::INIT_SAYS`].
const TEXT: &str = "husk: init marks\n";

/// An initramfs (cpio) whose `/init` marks and powers off.
pub fn initramfs() -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.character_device("dev/port", 0o600, 1, 4)?;
    archive.file("init", 0o755, &program())?;
    archive.finish()
}

/// A static ELF executable of one segment, headers and all.
fn program() -> Vec<u8> {
    let code = CODE.concat();
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::from(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes()); // EV_CURRENT
    put(&(BASE + HEADERS).to_le_bytes()); // e_entry
    put(&64u64.to_le_bytes()); // e_phoff
    put(&0u64.to_le_bytes()); // e_shoff
    put(&0u32.to_le_bytes()); // e_flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, and no sections
    }
    put(&1u32.to_le_bytes()); // PT_LOAD
    put(&5u32.to_le_bytes()); // PF_R | PF_X
    for word in [0, BASE, BASE, size, size, 0x1000] {
        put(&word.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    elf.extend_from_slice(&code);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_and_the_text_are_where_the_code_says() {
        let at = |part: usize| CODE.iter().take(part).map(|code| code.len()).sum::<usize>();
        // The end of the instruction and its displacement.
        for (after, displacement, to) in [
            (5, 0x0c, 11),  // jnz port
            (11, 0x58, 33), // jmp end
            (13, 0x6d, 42), // lea path
            (17, 0x29, 28), // js say
            (20, 0x52, 41), // lea marks
            (28, 0x18, 33), // jz end
            (31, 0x32, 43), // lea text
        ] {
            assert_eq!(at(after) + displacement, at(to), "before part {after}");
        }
        assert_eq!(at(41) - 9, at(38)); // jmp wait
        assert!(TEXT.contains(crate::console::INIT_SAYS));
    }

    #[test]
    fn it_is_a_program_as_readelf_sees_it() {
        let file = std::env::temp_dir().join(format!("husk-init-{}", std::process::id()));
        std::fs::write(&file, program()).unwrap();
        let output = std::process::Command::new("readelf")
            .args(["-W", "-h", "-l"])
            .arg(&file)
            .output();
        std::fs::remove_file(&file).unwrap();
        let output = output.expect("readelf of binutils");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.stderr.is_empty(), "{output:?}");
        assert!(text.contains("EXEC (Executable file)"), "{text}");
        assert!(text.contains("0x400078"), "{text}");
        assert!(text.contains("R E 0x1000"), "{text}");
    }
}
