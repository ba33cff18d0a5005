. /p/host.sh
bridge 10.0.0.1
start vmlinuz 1
cp "$serial" /out/serial
until_ 30 ping -c 1 -w 2 10.0.0.9
fetch || fail "no page"
stop
start vmlinux 2
(while :; do fetch && echo fetched || echo missed; done > /tmp/fetches) &
fetches=$!
pulses=0
while [ $pulses -lt "${PULSES:-10}" ]; do
    ferry pulse lin --count 2 > /tmp/pulse || fail "pulse $pulses"
    pulses=$((pulses+1)); [ $((pulses%5)) = 0 ] && goes_on
done
goes_on
kill $fetches
grep -q missed /tmp/fetches && fail "a fetch was cut"
echo "$pulses times two pulses, $(grep -c fetched /tmp/fetches) whole fetches meanwhile"
stop
[ -z "$(ls /sys/class/net | grep -v -E '^(lo|eth0|br0)$')" ] || fail "a TAP was left behind"
