# Boots a systemd of its own over a copy-on-write view of this root: boot.sh DIRECTORY PROGRAMS NAME=VALUE..
#
# Run as the first process of new mount, PID, UTS, IPC and cgroup namespaces. In DIRECTORY, a file system of its own: what the
# machine wrote, which a second boot finds again, and `init`, the number by which the outside knows its first process.
set -eu
directory=$1 programs=$2
shift 2
# The old /proc still counts as the outside does.
read -r outside _ </proc/self/stat
mkdir -p "$directory"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$directory/upper,workdir=$directory/work" "$directory/root"
cd "$directory/root"

if [ ! -e etc/mesh-machine ]; then
  # Nothing of this machine's own services, mesh and keys is to be seen in there.
  rm -rf etc/systemd/system etc/mesh etc/mesh-keyserver var/lib/mesh var/lib/systemd/credential.secret
  mkdir -p etc/systemd/system
  touch etc/mesh-machine
fi
units=usr/local/lib/mesh-machine
mkdir -p "$units" usr/local/bin
stock=usr/lib/systemd/system
cp "$stock"/systemd-journald{.service,.socket,-dev-log.socket} "$stock"/{shutdown,network,network-pre}.target "$units"
printf '[Unit]\nDefaultDependencies=no\nWants=systemd-journald.service\nAfter=systemd-journald.service\n' >"$units/sysinit.target"
printf '[Unit]\nRequires=sysinit.target\nAfter=sysinit.target\n' >"$units/basic.target"
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' >"$units/multi-user.target"
for program in meshd meshctl keyserver; do
  touch "usr/local/bin/$program"
  mount --bind "$programs/$program" "usr/local/bin/$program"
done

mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run -o mode=755
mount -t tmpfs tmpfs tmp -o mode=1777
mount -t tmpfs tmpfs dev -o mode=755
for device in null zero full random urandom tty; do
  touch "dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/net dev/pts dev/shm
mknod dev/net/tun c 10 200
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
mount -t tmpfs tmpfs dev/shm -o mode=1777
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
echo machine >proc/sys/kernel/hostname

mkdir -p outside
pivot_root . outside
echo "$outside" >"/outside$directory/init"
umount -l outside
# systemd hands credentials over by a mount that has to reach it from a process beside it.
mount --make-rshared /
exec env -i container=mesh "$@" /lib/systemd/systemd --unit=multi-user.target --show-status=no
