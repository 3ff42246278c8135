"""microheart: its MicroVM boots a configuration file, with devices on PCI, and asks over the socket for what it became."""

import os
import sys
import time

kernel, initrd, drive, home = sys.argv[1:]
# Where it finds a kernel and Firecracker, or downloads them to.
os.environ["MICROHEART_HOME"] = home
os.symlink("/usr/local/bin/firecracker", f"{home}/firecracker")
os.symlink(kernel, f"{home}/vmlinux-1")
from microheart.api import request
from microheart.vm import MicroVM

vm = MicroVM("husk", rootfs=drive, key=initrd, vcpu=2, mem_mib=64)
# For the stand-in for ssh: a guest that is up can be reached.
os.environ["GUEST_CONSOLE"] = str(vm.console)
if vm.start(wait=30) is None:
    sys.exit("it was running before")
config = vm.machine_config()
if (config["vcpu_count"], config["mem_size_mib"]) != (2, 64):
    sys.exit(f"the machine: {config}")
config = request(vm.sock, "GET", "/vm/config")
(interface,) = config["network-interfaces"]
if (interface["host_dev_name"], interface["guest_mac"].upper()) != ("mh0", "06:00:AC:10:00:02"):
    sys.exit(f"the interface: {interface}")
info = request(vm.sock, "GET", "/")
if info["state"] != "Running":
    sys.exit(f"the VM: {info}")
request(vm.sock, "PATCH", "/vm", {"state": "Paused"})
request(vm.sock, "PATCH", "/vm", {"state": "Resumed"})
try:
    request(vm.sock, "PUT", "/nothing", {})
    sys.exit("a path that there is not was not refused")
except RuntimeError as error:
    if "400" not in str(error) or "fault_message" not in str(error):
        sys.exit(f"a path that there is not: {error}")
# This guest's answer is a reset.
request(vm.sock, "PUT", "/actions", {"action_type": "SendCtrlAltDel"})
until = time.monotonic() + 30
while "9d " not in vm.tail():
    if time.monotonic() > until:
        sys.exit(f"no keys came: {vm.tail()}")
    time.sleep(0.05)
vm.clean()
if vm.running() or vm.dir.exists():
    sys.exit("it is still there")
print("microheart is done")
