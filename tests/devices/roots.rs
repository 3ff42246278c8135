//! A guest's root file system on a disk.

use crate::common::guest::{Kernel, LIMIT, busybox};
use crate::common::{Vm, husk, temp_dir, text};
use crate::help::guest;
use crate::host::{command, make_image};
use crate::served::Server;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// What runs on the root file system: writes where it can be written, and powers off.
const INIT: &str = "#!/bin/sh
b=/bin/busybox
$b mount -t proc proc /proc 2>/dev/null
$b mount -t sysfs sys /sys 2>/dev/null
$b dmesg -n 1
$b grep ' / ' /proc/mounts
$b cat /etc/hello
if $b touch /written 2>/dev/null; then
	$b dd if=/dev/urandom of=/written bs=64k count=100 2>/dev/null
	$b sync
	echo 3 >/proc/sys/vm/drop_caches
	echo sum $($b md5sum </written)
	$b mount -o remount,ro /
else
	echo read-only
fi
$b poweroff -f
";

/// In place of the default guest's: as a distribution's initramfs does it, for a kernel that has its drivers as modules.
const SWITCH: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
while read -r m; do $b insmod /lib/modules/husk/$m.ko 2>/dev/null; done </etc/modules
$b mkdir /root
for mode in $($b cat /proc/cmdline); do
	case $mode in root=*) device=${mode#root=} ;; ro | rw) $b mount -t TYPE -o $mode $device /root ;; esac
done
$b mount -o move /dev /root/dev
exec $b switch_root /root /sbin/init
";

/// Mounted, written, powered off: ext4 and erofs, which their own checkers then find without fault.
pub fn a_root_file_system_is_on_a_disk(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let root = dir.path().join("root");
    make_root(&root);
    let ext4 = dir.path().join("ext4");
    make_image(&ext4, 32 << 20);
    command("mkfs.ext4", &["-q", "-F", "-d", text(&root), text(&ext4)]);
    let erofs = dir.path().join("erofs");
    command("mkfs.erofs", &[text(&erofs), text(&root)]);
    let before = std::fs::read(&erofs).unwrap();

    let written = boot(
        kernel,
        &[
            flags,
            &["--disk", &format!("{},root,cache=writeback", text(&ext4))],
        ]
        .concat(),
        "ext4",
    );
    for said in [" / ext4 rw", "from the root file system\n", "sum "] {
        assert!(written.contains(said), "no {said:?}\n{written}");
    }
    command("e2fsck", &["-f", "-n", text(&ext4)]);
    // What the guest wrote is in the image.
    let out = dir.path().join("written");
    let dump = format!("dump /written {}", out.display());
    command("debugfs", &["-R", &dump, text(&ext4)]);
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 100 << 16);
    let sum = command("md5sum", &[text(&out)]);
    let sum = format!("sum {}", sum.split(' ').next().unwrap());
    assert!(written.contains(&sum), "no {sum}\n{written}");

    let disk = format!("{},root,ro", text(&erofs));
    let read = boot(kernel, &[flags, &["--disk", &disk]].concat(), "erofs");
    for said in [" / erofs ro", "from the root file system\nread-only\n"] {
        assert!(read.contains(said), "no {said:?}\n{read}");
    }
    command("fsck.erofs", &[text(&erofs)]);
    assert!(
        std::fs::read(&erofs).unwrap() == before,
        "erofs has changed"
    );
}

/// The same with servers of the images: ext4 is written, erofs cannot be, which its server says.
pub fn a_root_file_system_is_served(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let root = dir.path().join("root");
    make_root(&root);
    let [ext4, erofs] = ["ext4", "erofs"].map(|name| dir.path().join(name));
    make_image(&ext4, 32 << 20);
    command("mkfs.ext4", &["-q", "-F", "-d", text(&root), text(&ext4)]);
    command("mkfs.erofs", &[text(&erofs), text(&root)]);
    let server = Server::start(&ext4, ",writable=on");
    let disk = server.disk(",root,cache=writeback");
    let written = boot(kernel, &[flags, &["--disk", &disk]].concat(), "ext4");
    for said in [" / ext4 rw", "from the root file system\n", "sum "] {
        assert!(written.contains(said), "no {said:?}\n{written}");
    }
    drop(server);
    command("e2fsck", &["-f", "-n", text(&ext4)]);

    let server = Server::start(&erofs, "");
    let disk = server.disk(",root");
    let read = boot(kernel, &[flags, &["--disk", &disk]].concat(), "erofs");
    for said in [" / erofs ro", "from the root file system\nread-only\n"] {
        assert!(read.contains(said), "no {said:?}\n{read}");
    }
}

/// The console of a guest with this root file system.
fn boot(kernel: &Kernel, arguments: &[&str], kind: &str) -> String {
    let mut command = husk();
    command.args(["run", "--kernel", text(&kernel.image), "--cmdline", "quiet"]);
    let initramfs = kernel.modules.is_some().then(|| {
        let switch = SWITCH.replace("TYPE", kind);
        guest(kernel, "").with_file("init", &switch)
    });
    if let Some(initramfs) = &initramfs {
        command.arg("--initrd").arg(initramfs.initrd());
    }
    let ended = Vm::start(command.args(arguments), LIMIT).finish();
    let console = ended.expect_status(0).console();
    assert_eq!(ended.stderr, "", "{console}");
    assert!(console.contains("reboot: Power down"), "{console}");
    console
}

/// What is on it: busybox, and [`INIT`].
fn make_root(root: &Path) {
    for folder in ["bin", "dev", "etc", "proc", "sbin", "sys"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    symlink("busybox", root.join("bin/sh")).unwrap();
    std::fs::write(root.join("etc/hello"), "from the root file system\n").unwrap();
    let init = root.join("sbin/init");
    std::fs::write(&init, INIT).unwrap();
    std::fs::set_permissions(&init, Permissions::from_mode(0o755)).unwrap();
}
