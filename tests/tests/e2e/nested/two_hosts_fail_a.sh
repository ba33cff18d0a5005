. /p/host.sh
bridge 10.0.0.1
until_ ping -c 1 -w 2 10.0.0.2
cp /p/guest.img /tmp/disk.img
start vmlinux 1 "" --cpu-template x86-64-v2
touch /tmp/count; sleep 36000 | nc 10.0.0.9 9000 > /tmp/count &
counted() { [ "$(wc -l < /tmp/count)" -gt "$1" ]; }
counts_on() { until_ counted $(($(wc -l < /tmp/count)+3)); }
# The other host waits for a word.
tell() { until_ sh -c 'echo now | nc 10.0.0.2 99'; }
fetches_begin
counts_on
# The other host dies in the middle: the guest is here, and so is its disk.
ferry migrate lin tcp://10.0.0.2:7070 --bandwidth 2MB --stall 10s --reconnect 5s > /tmp/crossing 2>&1 &
crossing=$!
sleep 6
kill -0 $crossing || fail "the crossing was over before the host could die"
tell
wait $crossing && fail "it crossed to a host that was off"
tail -1 /tmp/crossing
grep -q "the machine is here" /tmp/crossing || fail "nobody says where the machine is"
goes_on
counts_on
echo "the guest is here and well: $(grep ALIVE "$serial" | tail -1)"
# A new one stands in its place. Its cable is out for a while: the crossing finds its way again.
until_ ping -c 1 -w 2 10.0.0.2
ferry migrate lin tcp://10.0.0.2:7070 --bandwidth 2MB --stall 10s --reconnect 300s --verify > /tmp/crossing 2>&1 &
crossing=$!
sleep 6
for nic in /sys/class/net/eth0 /sys/class/net/enp*; do [ -e "$nic/device" ] && break; done
kill -0 $crossing || fail "the crossing was over before the cable was out"
echo "the cable is out after $(cat /tmp/crossing | wc -l) lines of progress"
ip link set "${nic##*/}" down; sleep 20; ip link set "${nic##*/}" up
wait $crossing || fail "the way there"
tail -1 /tmp/crossing
grep -q "connecting again" /tmp/crossing || fail "the cable's absence was not noticed"
counts_on
echo "$(fetches_whole) whole fetches"
n=0; while read -r line; do n=$((n+1)); [ "$line" = $n ] || fail "after $n came $line"; done < /tmp/count
echo "one connection that counted to $n"
cp "$serial" /out/serial-1
tell
