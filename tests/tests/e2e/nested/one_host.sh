. /p/host.sh
bridge 10.0.0.1
cp /p/guest.img /tmp/disk.img
start vmlinuz 1 noxsave
until_ ping -c 1 -w 2 10.0.0.9
fetch || fail "no page"
ferry pulse lin --count 2 || fail "a pulse"
goes_on
stop /tmp/disk.img
cp "$serial" /out/serial-1; cp /tmp/hvc /out/boot-log
start vmlinux 2 "" --cpu-template x86-64-v2
fetches_begin
pulses=0
while [ $pulses -lt $PULSES ]; do
    ferry pulse lin --count 2 > /tmp/pulse || fail "pulse $pulses"
    pulses=$((pulses+2)); [ $((pulses%6)) = 0 ] && goes_on
done
goes_on
echo "$pulses pulses, $(fetches_whole) whole fetches meanwhile, guest says $(grep ALIVE "$serial" | tail -1)"
stop /tmp/disk.img
cp "$serial" /out/serial-2
log_in
[ -z "$(ls /sys/class/net | grep -v -E '^(lo|eth0|br0)$')" ] || fail "a TAP was left behind"
