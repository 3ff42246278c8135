#!/bin/busybox sh
# Init of the emulated host: puts an overlay over this machine's root file system and runs the command.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mkdir -p /control /lower /rw
while read -r m; do $b insmod "/lib/modules/husk/$m.ko" 2>/dev/null; done </etc/modules
o9p=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o $o9p control /control
$b mount -t 9p -o $o9p,cache=loose,ro root /lower
$b mount -t tmpfs -o mode=755,size=75% rw /rw
$b mkdir -p /rw/u /rw/w /rw/r
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/u,workdir=/rw/w root /rw/r
r=/rw/r
$b mkdir -p $r/out $r/dev $r/proc $r/sys $r/tmp $r/run
$b mount -t 9p -o $o9p out $r/out
$b mount -o bind /dev $r/dev
$b ln -s /proc/self/fd $r/dev/fd
for n in 0:stdin 1:stdout 2:stderr; do $b ln -s "/proc/self/fd/${n%%:*}" "$r/dev/${n#*:}"; done
$b mkdir -p $r/dev/pts $r/dev/shm
$b mount -t devpts devpts $r/dev/pts
$b mount -t tmpfs shm $r/dev/shm
$b mount -o bind /proc $r/proc
$b mount -o bind /sys $r/sys
$b mount -t cgroup2 none $r/sys/fs/cgroup
$b mount -t tmpfs run $r/run
$b cp /control/cmd /control/stdin $r/run/
: >/control/up
$b ip link set lo up
echo 1 >/proc/sys/kernel/printk
# Moved over the root, the overlay is no mere chroot, in which the kernel forbids user name spaces. This shell still has the
# old root, and stays in the new one.
cd $r || exit 1
$b mount --move . /
if [ -e /control/tty ]; then
	$b setsid -c $b chroot . /bin/sh /run/cmd </dev/hvc0 >/dev/hvc0 2>&1
	echo $? >/control/rc
	$b sync
	$b umount out /control
	$b reboot -f
else
	beat=
	pulse=$(echo /dev/vport*p2)
	if [ -e "$pulse" ]; then
		# Whoever sends on this port wants to see that this machine lives.
		(
			exec <>"$pulse"
			while read -r line; do echo "$line" >&0; done
		) &
		beat=$!
	fi
	# Through a pipe: the port can be opened once only, and /dev/stdout is to be opened by anyone.
	port=$(echo /dev/vport*p1)
	$b mkfifo /output
	$b cat /output >"$port" &
	cat=$!
	$b chroot . /bin/sh -c 'exec /bin/sh /run/cmd </run/stdin' >/output 2>&1
	status=$?
	# What the command left running would keep the pipe open.
	for p in /proc/[0-9]*; do
		p=${p#/proc/}
		[ "$p" = 1 ] || [ "$p" = "$cat" ] || [ "$p" = "$beat" ] || kill -9 "$p" 2>/dev/null
	done
	wait $cat
	$b sync
	$b umount out
	# The last of the output. Whoever reads it ends this machine.
	echo "$($b cat /control/end)$status" >"$port"
	$b sleep 60
	$b reboot -f
fi
