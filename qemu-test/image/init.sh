#!/bin/sh
# The guest's first process: mounts, loads modules, runs the scenarios that the host asks for, powers off.
# They talk to the host over the second serial port; the first one is the console.
# Every process that it starts costs an emulated machine some 20 ms: what the shell can do itself it does.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux ENV=/etc/shrc
. /etc/shrc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
for module in /early/*; do insmod "$module"; done
# The kernel looks for disks while it goes on.
until [ -b /dev/nvme0n1 ]; do sleep 0.02; done
mount -t erofs -o ro /dev/nvme0n1 /base
ip link set lo up

# The words `vipsec.NAME=VALUE` of the kernel command line.
interactive=0
read -r words </proc/cmdline
for word in $words; do
  case $word in
    vipsec.dist=*) dist=${word#*=} ;;
    vipsec.modules=*) modules=${word#*=} ;;
    vipsec.interactive=*) interactive=${word#*=} ;;
  esac
done

# A function gets its driver when its scenario begins (guest/state.ts).
echo 0 >/sys/bus/pci/drivers_autoprobe
IFS=,
[ -z "$modules" ] || modprobe -a $modules || echo "init: module among $modules does not load"
unset IFS

stty -F /dev/ttyS1 raw -echo 115200
# Threads of V8's own cost an emulated processor more switches than they save.
main="--single-threaded /app/$dist/qemu-test/guest/main.js"
if [ "$interactive" = 1 ]; then
  printf '#!/bin/sh\nexec node %s\n' "$main" >/bin/scenario
  chmod +x /bin/scenario
  echo "Type 'scenario' to run it; leave the shell to power off."
  setsid cttyhack sh
else
  node $main >/dev/console 2>&1 || echo "{\"type\":\"exit\",\"status\":$?}" >/dev/ttyS1
fi
sync
poweroff -f
