# Sourced by the jobs of outer machines.
export PATH=/p:$PATH LD_LIBRARY_PATH=/p FERRY_RUNTIME_DIR=/run/ferry
serial=/tmp/serial
fail() {
    echo "JOB FAILED: $*"; tail -30 "$serial"; ferry list --all; ferry logs lin | tail -20
    tr '\r' '\n' < /tmp/crossing 2>/dev/null | tail -5; tail -5 /tmp/receiver
    exit 1
}
# Waits until a command succeeds. The limit only ends what hangs: an emulated machine on a busy one is slow.
until_() {
    local left=300
    while ! "$@" >/dev/null 2>&1; do left=$((left-1)); [ $left -gt 0 ] || fail "waited in vain for: $*"; sleep 1; done
}
# The newest number that the guest has said.
alive() { grep '^ALIVE' "$serial" | tail -1 | cut -d' ' -f2; }
is_past() { [ "$(alive)" -gt "$1" ]; }
goes_on() { until_ is_past $(($(alive)+2)); }
fetch() { timeout 120 wget -q -O /tmp/fetched http://10.0.0.9/big && [ "$(tr -d F < /tmp/fetched | wc -c) $(stat -c %s /tmp/fetched)" = "0 1048576" ]; }
# Fetches again and again, until told to stop; fetches_whole says how many came, and fails if one was cut.
fetches_begin() { (while :; do fetch && echo fetched || echo missed; done > /tmp/fetches) & fetching=$!; }
fetches_whole() {
    kill $fetching
    ! grep -q missed /tmp/fetches && grep -q fetched /tmp/fetches || fail "a fetch was cut"
    grep -c fetched /tmp/fetches
}
bridge() {
    ip link add br0 type bridge; ip link set br0 up; ip addr add "$1/24" dev br0
    for nic in /sys/class/net/eth0 /sys/class/net/enp*; do
        [ -e "$nic/device" ] && ip link set "${nic##*/}" up && ip link set "${nic##*/}" master br0
    done
}
# The guest's initramfs with the guest's job added to it.
add_job() { (mkdir /tmp/add && cd /tmp/add && cp /p/guest.sh . && find . | cpio -o -H newc 2>/dev/null) | cat /p/guest.cpio - > /tmp/initrd; }
# A guest here must not use XSAVE: QEMU 7.2 does not intercept XSETBV, so KVM in the outer machine never hears of the
# guest's XCR0. It answers CPUID leaf 0xd with 576 bytes (x87 and SSE) where the guest has set 7 and expects 832: "XSAVE
# consistency problem". It could not save XCR0 either. Seen by tracing kvm_exit (XSETBV: none, in a boot with 2,041 exits
# for CPUID) and kvm_cpuid (what ferry gave is what KVM supports). So: noxsave, or a --cpu-template without xsave.
words="console=ttyS0 quiet ferry.disk ferry.ip=10.0.0.9/24 ferry.run=/guest.sh"
start() { # KERNEL CPUS WORDS [OPTION...]
    local kernel=$1 cpus=$2 more=$3; shift 3
    rm -f "$serial" /tmp/hvc
    ferry run lin --kernel "/p/$kernel" --initrd /tmp/initrd --memory 256M --cpus "$cpus" --cmdline "$words $more" --detach \
        --disk path=/tmp/disk.img --net bridge=br0 --rng --balloon --console file=/tmp/hvc --serial file="$serial" "$@" \
        || fail "it does not start"
    until_ is_past 0
    echo "$kernel with $cpus CPUs: $(grep GUEST-READY "$serial")"
}
# Without a job the initramfs offers a login on the serial console.
log_in() {
    ferry run lin --kernel /p/vmlinux --initrd /p/guest.cpio --memory 256M --cpu-template x86-64-v2 --detach \
        --cmdline "console=ttyS0 quiet ferry.disk" --disk path=/tmp/disk.img || fail "it does not start"
    mkfifo /tmp/keys; serial=/tmp/screen
    ferry console lin < /tmp/keys > /tmp/screen 2>&1 &
    exec 3> /tmp/keys
    until_ grep -q 'ferry-guest login:' /tmp/screen
    printf 'root\r' >&3
    until_ grep -q '/root #' /tmp/screen
    # What is typed is echoed as it is: only the answer has the sum in it.
    printf 'cat /mnt/n; echo sum=$((20+22))\r' >&3
    until_ grep -q sum=42 /tmp/screen
    stop /tmp/disk.img
    exec 3>&-
    cp /tmp/screen /out/login
}
stop() { # DISK
    ferry stop lin --timeout 200s || fail "the power button is not heard"
    e2fsck -fn "$1" > /tmp/fsck 2>&1 || { cat /tmp/fsck; fail "the file system is damaged"; }
    tail -1 /tmp/fsck
}
add_job
