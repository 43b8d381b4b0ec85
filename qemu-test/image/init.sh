#!/bin/sh
# The guest's first process: mounts, loads modules, runs the scenario that the kernel command line names, powers off.
# The scenario talks to the host over the second serial port; the first one is the console.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux ENV=/etc/shrc
. /etc/shrc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ip link set lo up

# Value of `vipsec.NAME=` on the kernel command line.
option() { sed -n "s/.*\<vipsec\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

for module in $(option modules | tr , ' '); do
  modprobe "$module" || echo "init: module $module does not load"
done

stty -F /dev/ttyS1 raw -echo 115200
main=/app/$(option dist)/qemu-test/guest/main.js
printf '#!/bin/sh\nexec node %s "${1:-%s}"\n' "$main" "$(option scenario)" >/bin/scenario
chmod +x /bin/scenario

if [ "$(option interactive)" = 1 ]; then
  echo "Type 'scenario' to run $(option scenario); leave the shell to power off."
  setsid cttyhack sh
else
  scenario >/dev/console 2>&1 || echo "{\"type\":\"exit\",\"status\":$?}" >/dev/ttyS1
fi
sync
poweroff -f
