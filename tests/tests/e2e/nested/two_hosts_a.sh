. /p/host.sh
bridge 10.0.0.1
until_ 60 ping -c 1 -w 2 10.0.0.2
mkdir /tmp/back
start vmlinux 2
# An nc whose input ends closes its half, and the guest's nc ends then.
sleep 3600 | nc 10.0.0.9 9000 > /tmp/count &
(while :; do fetch && echo fetched || echo missed; sleep 1; done > /tmp/fetches) &
fetches=$!
counted() { [ "$(wc -l < /tmp/count)" -gt "$1" ]; }
until_ 60 counted 2
ferry migrate lin tcp://10.0.0.2:7070 --verify --report /out/there.json > /tmp/there 2>&1 || { tr '\r' '\n' < /tmp/there | tail -5; fail "the way there"; }
tail -1 /tmp/there
there=$(wc -l < /tmp/count)
until_ 90 counted $((there+3))
ferry receive tcp://10.0.0.1:7070 --insecure-plaintext --once --dir /tmp/back --serial file="$serial.back" > /tmp/receiver 2>&1 &
serial=$serial.back
until_ 200 grep -q ALIVE "$serial"
back=$(wc -l < /tmp/count)
until_ 90 counted $((back+3))
kill $fetches
grep -q missed /tmp/fetches && fail "a fetch was cut"
# One connection all the time, and no number lost in it.
n=0; while read -r line; do n=$((n+1)); [ "$line" = $n ] || fail "after $n came $line"; done < /tmp/count
echo "there and back; $(grep -c fetched /tmp/fetches) whole fetches, one connection that counted to $n"
mv /tmp/back/disk.img /tmp/disk.img
stop
