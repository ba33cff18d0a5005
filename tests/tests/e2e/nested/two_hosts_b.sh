. /p/host.sh
bridge 10.0.0.2
# This host's clock is behind the other's. A guest that comes must not see its own go back.
date -s "@$(($(date +%s)-5))" > /dev/null
trip=0
while [ $trip -lt $TRIPS ]; do
    trip=$((trip+1)); serial=/tmp/serial-$trip
    mkdir /tmp/there-$trip
    ferry receive tcp://10.0.0.2:7070 --insecure-plaintext --once --dir /tmp/there-$trip --serial file="$serial" > /tmp/receiver 2>&1 &
    until_ grep -q ALIVE "$serial"
    goes_on
    fetch || fail "no page"
    # The other host begins to listen when it has heard from the guest.
    tries=0
    until ferry migrate lin tcp://10.0.0.1:7070 --report /out/back-$trip.json > /tmp/crossing 2>&1; do
        tries=$((tries+1)); [ $tries -lt 30 ] || fail "the way back"
        sleep 3
    done
    tail -1 /tmp/crossing
    rm /tmp/there-$trip/disk.img; cp "$serial" /out/serial-$trip-2
done
