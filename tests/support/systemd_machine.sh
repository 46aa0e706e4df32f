#!/bin/sh
# Boot systemd as process 1 of new namespaces, run one script in them as root, and exit with the script's status.
# The file system is a copy-on-write overlay of this machine's, with the documented units, the user order-tracking,
# the settings file, and the code in /opt/order-tracking. The script's output goes to the file output in the folder.
#
#   systemd_machine.sh SCRIPT FOLDER CLONE PYTHON_PREFIX SITE_PACKAGES
set -eu

flags="--mount --uts --ipc --net --cgroup --pid --fork --kill-child --propagation private"
if [ "${1-}" = --probe ]; then
	# shellcheck disable=SC2086 # several flags
	exec unshare $flags sh -c 'mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/root &&
		mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root &&
		mount -t cgroup2 cgroup2 /mnt/root'
fi

if [ "${IN_NAMESPACES-}" = "" ]; then
	# A control group of its own, so that this systemd does not manage those of the machine.
	unshare --mount --propagation private sh -euc '
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		group=/sys/fs/cgroup$(sed -n "s/^0:://p" /proc/self/cgroup)/order-tracking-test-$$
		mkdir "$group"
		trap "find \"$group\" -depth -type d -exec rmdir {} +" EXIT
		flags=$1; shift
		sh -euc "echo \$\$ >\"$group/cgroup.procs\"; IN_NAMESPACES=yes exec unshare $flags \"\$@\"" sh "$@"
	' sh "$flags" "$0" "$@"
	exit "$(cat "$2/status")"
fi

script=$1 folder=$2 clone=$3 prefix=$4 packages=$5
disk=$folder/disk root=$folder/disk/root
mkdir "$disk"
mount -t tmpfs -o mode=755 tmpfs "$disk"
mkdir "$disk/up" "$disk/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/up,workdir=$disk/work" "$root"
mount -t proc proc "$root/proc"
# Hide the data of a service that runs on this machine.
[ ! -d "$root/var/lib/order-tracking" ] || mount -t tmpfs -o mode=755 tmpfs "$root/var/lib/order-tracking"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
	: >"$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ip link set lo up

# The environment's Python may be in a home folder, which ProtectHome=true hides.
opt=$root/opt/order-tracking
version=$(basename "$(dirname "$packages")")
mkdir -p "$root/opt/python" "$opt/.venv/bin" "$opt/.venv/lib/$version/site-packages" "$root/host"
mount --bind "$prefix" "$root/opt/python"
mount --bind "$packages" "$opt/.venv/lib/$version/site-packages"
mount --bind "$folder" "$root/host"
ln -s "/opt/python/bin/$version" "$opt/.venv/bin/python"
printf 'home = /opt/python/bin\ninclude-system-site-packages = false\n' >"$opt/.venv/pyvenv.cfg"
cp "$clone/.venv/bin/order-tracking" "$opt/.venv/bin/"
cp -R "$clone/domain" "$clone/projections" "$clone/service" "$clone/docs" "$clone/schema.sql" "$opt/"

rm -rf "$root/etc/systemd/system" "$root/etc/systemd/network"
mkdir "$root/etc/systemd/system"
cp "$clone"/docs/operations/order-tracking* "$root/etc/systemd/system/"
chroot "$root" useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin order-tracking
echo ORDER_TRACKING_STATE_DIR=/var/lib/order-tracking >"$root/etc/order-tracking.env"
chmod 600 "$root/etc/order-tracking.env"
chroot "$root" chown order-tracking /etc/order-tracking.env
cp "$script" "$root/etc/test.sh"
# For a Python with a shared library.
printf '[Manager]\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n' >"$root/etc/systemd/system.conf"
# Nothing but the script starts: the target has no default dependencies.
cat >"$root/etc/systemd/system/test.service" <<'UNIT'
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh -c "sh /etc/test.sh; echo $$? >/host/status"
ExecStopPost=systemctl exit --force --force
StandardOutput=file:/host/output
StandardError=inherit
TimeoutStartSec=240
UNIT
printf '[Unit]\nDefaultDependencies=no\nWants=test.service\n' >"$root/etc/systemd/system/test.target"
echo 1 >"$folder/status"

mkdir "$root/old"
cd "$root"
pivot_root . old
umount -l /old
exec setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time,-sys_boot \
	env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
	/lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no \
	</dev/null >/host/console 2>&1
