#!/bin/sh
# What the user of Husk's default guest meets: the script, else a shell. The end of it powers off.
exec </dev/console >/dev/console 2>&1

if [ -e /script ]; then
    /bin/sh /script
else
    cpus=$(nproc)
    memory=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    echo
    echo "Hello from Husk: Linux $(uname -r), $cpus CPU(s), $((memory / 1024)) MiB of memory."
    echo "Type exit or poweroff to power off; Ctrl-A x ends the virtual machine at once."
    cd /root
    setsid cttyhack /bin/sh -l
fi
kill -USR2 1
