# Sourced by the jobs of outer machines.
export PATH=/p:$PATH LD_LIBRARY_PATH=/p FERRY_RUNTIME_DIR=/run/ferry
serial=/tmp/serial
fail() {
    echo "JOB FAILED: $*"; tail -30 "$serial"; ferry list --all; ferry logs lin | tail -20; tail -5 /tmp/receiver
    exit 1
}
# Waits until a command succeeds: until_ SECONDS COMMAND...
until_() {
    local left=$1; shift
    while ! "$@" >/dev/null 2>&1; do left=$((left-1)); [ $left -gt 0 ] || fail "waited in vain for: $*"; sleep 1; done
}
# The newest number that the guest has said.
alive() { grep '^ALIVE' "$serial" | tail -1 | cut -d' ' -f2; }
is_past() { [ "$(alive)" -gt "$1" ]; }
goes_on() { until_ 60 is_past $(($(alive)+2)); }
fetch() { timeout 60 wget -q -O /tmp/fetched http://10.0.0.9/big && [ "$(tr -d F < /tmp/fetched | wc -c) $(stat -c %s /tmp/fetched)" = "0 1048576" ]; }
is_sound() { ! grep -q GUEST-COMPLAINS "$serial" || fail "the guest's kernel complains"; }
bridge() {
    ip link add br0 type bridge; ip link set br0 up; ip addr add "$1/24" dev br0
    for nic in /sys/class/net/eth0 /sys/class/net/enp*; do
        [ -e "$nic/device" ] && ip link set "${nic##*/}" up && ip link set "${nic##*/}" master br0
    done
}
# The guest's initramfs with the guest's job added to it.
add_job() { (mkdir /tmp/add && cd /tmp/add && cp /p/guest.sh . && find . | cpio -o -H newc 2>/dev/null) | cat /p/guest.cpio - > /tmp/initrd; }
# Without noxsave the guest warns that XSAVE sizes do not agree. Why is not known: perhaps the emulation does not intercept XSETBV.
words="console=ttyS0 quiet noxsave ferry.disk ferry.ip=10.0.0.9/24 ferry.run=/guest.sh"
start() { # KERNEL CPUS
    rm -f "$serial"
    ferry run lin --kernel "/p/$1" --initrd /tmp/initrd --memory 256M --cpus "$2" --cmdline "$words" --detach \
        --disk path=/tmp/disk.img --net bridge=br0 --rng --balloon --console file=/tmp/hvc --serial file="$serial" \
        || fail "it does not start"
    until_ 90 is_past 0
    echo "$1 with $2 CPUs: $(grep GUEST-READY "$serial")"
}
stop() {
    ferry stop lin --timeout 30s || fail "the power button is not heard"
    is_sound
    e2fsck -fn /tmp/disk.img > /tmp/fsck 2>&1 || { cat /tmp/fsck; fail "the file system is damaged"; }
    tail -1 /tmp/fsck
}
add_job
cp /p/guest.img /tmp/disk.img
