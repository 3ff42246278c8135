//! The pieces of the default guest.

use crate::host::{chain, shown};
use crate::{DefaultGuest, Finding};
use husk_loader::initramfs::Builder;
use std::fs::File;
use std::path::Path;

const BUSYBOX_ADVICE: &str =
    "sudo apt-get install busybox-static, or give --initrd PATH to `husk run`";

pub fn examine(guest: &DefaultGuest) -> Vec<Finding> {
    vec![kernel(&guest.kernel), busybox(guest.busybox.as_deref())]
}

fn kernel(kernel: &Result<std::path::PathBuf, String>) -> Finding {
    const NAME: &str = "kernel";
    let path = match kernel {
        Ok(path) => path,
        Err(reason) => {
            // The reason says what to do, after a colon.
            let (text, advice) = reason
                .split_once(": ")
                .unwrap_or((reason, "give one with --kernel PATH"));
            return Finding::warn(NAME, text, advice);
        }
    };
    let shown_path = path.display();
    // Only a regular file: opening a FIFO would wait for a writer.
    let opened = match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => Err("not a regular file".to_owned()),
        Ok(_) => File::open(path).map(drop).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    if let Err(reason) = opened {
        return Finding::warn(
            NAME,
            format!("{shown_path} cannot be read: {reason}"),
            "give another one with --kernel PATH or $HUSK_KERNEL",
        );
    }
    let release = husk_loader::kernel_release(path)
        .map(|release| format!(" ({})", shown(&release)))
        .unwrap_or_default();
    Finding::ok(
        NAME,
        format!("`husk run` boots {shown_path}{release} when none is named"),
    )
}

/// What `husk run` asks of a busybox is asked by building its initramfs.
fn busybox(path: Option<&Path>) -> Finding {
    const NAME: &str = "busybox";
    let Some(path) = path else {
        return Finding::warn(
            NAME,
            "there is none for the default guest's initramfs",
            BUSYBOX_ADVICE,
        );
    };
    match Builder::new(path.into()).build() {
        Ok(_) => Finding::ok(
            NAME,
            format!("{} is static, fit for the default guest", path.display()),
        ),
        Err(e) => Finding::warn(NAME, chain(&e), BUSYBOX_ADVICE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn a_missing_kernel_says_what_to_do() {
        let finding = kernel(&Err("no kernel found: give one with --kernel".into()));
        assert_eq!(finding.status, Status::Warn);
        assert_eq!(finding.text, "no kernel found");
        assert_eq!(finding.advice.as_deref(), Some("give one with --kernel"));
        assert!(kernel(&Err("none".into())).advice.is_some());
    }

    #[test]
    fn a_kernel_must_be_a_file_that_can_be_read() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(kernel(&Ok(directory.path().into())).status, Status::Warn);
        let file = directory.path().join("vmlinuz");
        assert_eq!(kernel(&Ok(file.clone())).status, Status::Warn);
        std::fs::write(&file, "").unwrap();
        let finding = kernel(&Ok(file));
        assert_eq!(finding.status, Status::Ok);
        assert!(finding.text.contains("vmlinuz"));
    }

    #[test]
    fn a_busybox_must_be_a_static_program() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(busybox(None).status, Status::Warn);
        let file = directory.path().join("busybox");
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        let finding = busybox(Some(&file));
        assert_eq!(finding.status, Status::Warn);
        assert!(finding.text.contains("busybox"));
    }
}
