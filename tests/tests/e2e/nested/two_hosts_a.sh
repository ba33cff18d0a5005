. /p/host.sh
bridge 10.0.0.1
until_ ping -c 1 -w 2 10.0.0.2
cp /p/guest.img /tmp/disk.img
disk=/tmp/disk.img
start vmlinux 2 "" --cpu-template x86-64-v2
# An nc whose input ends closes its half, and the guest's nc ends then.
touch /tmp/count; sleep 36000 | nc 10.0.0.9 9000 > /tmp/count &
counted() { [ "$(wc -l < /tmp/count)" -gt "$1" ]; }
counts_on() { until_ counted $(($(wc -l < /tmp/count)+3)); }
fetches_begin
counts_on
trip=0
while [ $trip -lt $TRIPS ]; do
    trip=$((trip+1))
    # The first way there compares all of memory and disk; the others show how long a switch takes without that.
    [ $trip = 1 ] && verify=--verify || verify=
    ferry migrate lin tcp://10.0.0.2:7070 $verify --report /out/there-$trip.json > /tmp/crossing 2>&1 || fail "the way there"
    tail -1 /tmp/crossing
    rm $disk; cp "$serial" /out/serial-$trip-1
    counts_on
    serial=/tmp/serial-back-$trip; disk=/tmp/back-$trip/disk.img
    mkdir /tmp/back-$trip
    ferry receive tcp://10.0.0.1:7070 --insecure-plaintext --once --dir /tmp/back-$trip --serial file="$serial" > /tmp/receiver 2>&1 &
    until_ grep -q ALIVE "$serial"
    counts_on
done
whole=$(fetches_whole)
# One connection all the time, and no number lost in it.
n=0; while read -r line; do n=$((n+1)); [ "$line" = $n ] || fail "after $n came $line"; done < /tmp/count
echo "$TRIPS times there and back; $whole whole fetches, one connection that counted to $n"
stop $disk
cp "$serial" /out/serial-last
