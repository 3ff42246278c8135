#!/bin/sh
# The first process of Husk's default guest. Whatever ends, the machine powers off: were this
# process to end, the kernel would panic.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM="${TERM:-linux}"

/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev 2>/dev/null
# Tell the monitor: 0, init runs; 1, it is done (`husk run --timeline` shows them).
/etc/husk/mark 0
/bin/busybox --install -s
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts 2>/dev/null
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ln -s /run /var/run
hostname husk
ip link set lo up

while read -r module; do
    insmod "/lib/modules/husk/$module.ko" 2>/dev/null
done </etc/modules

# Without ACPI there is nothing to power off with, and a reset ends the machine as well.
leave() {
    sync
    if [ -d /sys/firmware/acpi ]; then poweroff -f; fi
    reboot -f
}
# busybox's halt, poweroff and reboot ask process 1 by these signals.
trap leave USR1 USR2
trap 'sync; reboot -f' TERM

acpid -l /dev/null 2>/dev/null

/etc/husk/mark 1

# A plain `&` would leave the console's processes deaf to Ctrl-C: a shell without job control
# ignores SIGINT for them.
if ! start-stop-daemon -S -b -x /etc/husk/console 2>/dev/null; then
    /etc/husk/console &
fi
# A foreground command would hold up the traps; `wait` does not.
while :; do
    sleep 86400 &
    wait $!
done
