. /p/host.sh
bridge 10.0.0.2
ferry receive tcp://10.0.0.2:7070 --insecure-plaintext --once --dir /tmp --serial file="$serial" > /tmp/receiver 2>&1 &
rm /tmp/disk.img
until_ 200 grep -q ALIVE "$serial"
goes_on
fetch || fail "no page"
tries=0
until ferry migrate lin tcp://10.0.0.1:7070 --verify > /tmp/back 2>&1; do
    tries=$((tries+1)); [ $tries -lt 10 ] || { tail -3 /tmp/back; fail "the way back"; }
    sleep 3
done
tail -1 /tmp/back
is_sound
