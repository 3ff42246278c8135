"""pyrecracker: its VMManager starts `firecracker`, configures a VM, boots, pauses, resumes and stops it."""

import sys
import time

import pyrecracker.vm

kernel, initrd, drive, log, socket = sys.argv[1:]


def wait_for(text):
    """Until the guest's console, which is in Firecracker's log, says so."""
    until = time.monotonic() + 30
    while text not in open(log, "rb").read():
        if time.monotonic() > until:
            sys.exit(f"the console never said {text!r}: {open(log, 'rb').read()!r}")
        time.sleep(0.05)


vm = pyrecracker.vm.VMManager(socket, kernel, firecracker_logs_path=log)
time.sleep(0.5)
vm.initrd_path = initrd
vm.boot_args = "from pyrecracker"
vm.vcpu_count = 2
vm.mem_size_mib = 64
vm.smt = False
vm.track_dirty_pages = False
vm.huge_pages = pyrecracker.vm.HugePages.NONE
vm.path_on_host = drive
vm.is_read_only = False
vm.cache_type = pyrecracker.vm.CacheType.UNSAFE
vm.io_engine = pyrecracker.vm.IOEngine.SYNC
vm.host_dev_name = "tap7"
vm.guest_mac = "06:00:AC:10:00:02"
vm.host_ip = "172.16.7.1"
vm.guest_ip = "172.16.7.2"
vm.configure()
vm.start()
wait_for(b"up\n")
vm.pause()
vm.resume()
try:
    vm.start()
    sys.exit("a second start was not refused")
except pyrecracker.vm.VMError as error:
    if "400" not in str(error):
        sys.exit(f"a second start: {error}")
# Ctrl-Alt-Del, to which this guest's answer is a reset.
vm.stop()
wait_for(b"9d ")
print("pyrecracker is done")
