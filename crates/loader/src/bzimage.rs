//! bzImages: Linux's `Documentation/arch/x86/boot.rst`.

use crate::Error;
use crate::bytes::{u16_at, u32_at};
use crate::kernel::Image;

/// Where the compressed kernel lies in the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload {
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

const SETUP_SECTS: usize = 0x1f1;
const JUMP_LENGTH: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Whether the boot sector and `HdrS` are there.
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    head.get(HEADER_MAGIC..)
        .is_some_and(|rest| rest.starts_with(b"HdrS"))
        && head.get(0x1fe..0x200) == Some(b"\x55\xaa")
}

/// The payload, checked to lie within the file. It includes the four bytes of unpacked size.
pub(crate) fn payload(image: &Image<'_>) -> Result<Payload, Error> {
    let head = &image.head;
    let short = || image.truncated("the bzImage header", (PAYLOAD_LENGTH + 4) as u64);
    let version = u16_at(head, VERSION).ok_or_else(short)?;
    if version < 0x0208 {
        let [minor, major] = version.to_le_bytes();
        return Err(Error::OldProtocol {
            path: image.path.into(),
            major,
            minor,
        });
    }
    let offset = u64::from(u32_at(head, PAYLOAD_OFFSET).ok_or_else(short)?);
    let size = u64::from(u32_at(head, PAYLOAD_LENGTH).ok_or_else(short)?);
    // The offset counts from the protected-mode code. No sum of these can pass 2^34.
    let offset = setup_size(head).ok_or_else(short)? + offset;
    if offset + size > image.length {
        return Err(image.truncated("the compressed kernel", offset + size));
    }
    Ok(Payload { offset, size })
}

/// The setup header, from `setup_sects` (0x1f1) to the end that its jump instruction tells.
pub(crate) fn setup_header(image: &Image<'_>) -> Result<Vec<u8>, Error> {
    let jump = image.head.get(JUMP_LENGTH).copied().unwrap_or(0);
    let end = HEADER_MAGIC + usize::from(jump);
    let header = image.head.get(SETUP_SECTS..end);
    header
        .map(<[u8]>::to_vec)
        .ok_or_else(|| image.truncated("the bzImage header", end as u64))
}

/// Where in the file the kernel's version string begins, if the header names one that lies in the
/// setup code.
pub(crate) fn version_offset(head: &[u8]) -> Option<u64> {
    let pointer = u64::from(u16_at(head, KERNEL_VERSION)?);
    let offset = pointer + 0x200;
    (pointer != 0 && offset < setup_size(head)?).then_some(offset)
}

/// Bytes before the protected-mode code: the boot sector and the setup sectors, 4 where it says 0.
fn setup_size(head: &[u8]) -> Option<u64> {
    let sectors = match head.get(SETUP_SECTS)? {
        0 => 4,
        sectors => u64::from(*sectors),
    };
    Some((sectors + 1) * 512)
}
