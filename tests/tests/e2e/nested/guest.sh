# What a Linux guest does here: it tells what it found, serves HTTP and a connection that lasts, and writes to ext4.
# What its kernel says at warning level or worse goes to the serial port as KERNEL lines; the test judges each of them.
worse='ferry: the log is read|^<[0-4]>|BUG|WARNING|Call Trace|Oops|unsynchronized|unstable|stall|lockup|hung task|I/O error|EXT4-fs error|consistency'
for device in /sys/bus/pci/devices/*; do echo "PCI $(cat "$device/vendor") $(cat "$device/device")"; done
for device in /sys/bus/virtio/devices/*; do echo "VIRTIO $(basename "$(readlink "$device/driver")")"; done
echo "RNG $(cat /sys/class/misc/hw_random/rng_current)"
echo "CPU $(grep -m 1 ^flags /proc/cpuinfo)"
mount | grep '^/dev/vda '
echo 'ferry: the log is read' > /dev/kmsg
dmesg -r -c > /tmp/boot-log
[ -c /dev/hvc0 ] && cat /tmp/boot-log > /dev/hvc0
grep -E "$worse" /tmp/boot-log | sed 's/^/KERNEL /'
httpd -p 80 -h /mnt/www
printf 'n=0; while :; do n=$((n+1)); echo $n; sleep 1; done\n' > /tmp/count.sh
sh /tmp/count.sh | nc -l -p 9000 &
# Four files in turn. Each is read back, from the disk and not from memory, when the three others have been written.
(cd /mnt; n=0; while :; do
    n=$((n+1)); file=file$((n%4))
    echo 3 > /proc/sys/vm/drop_caches
    [ $n -le 4 ] || md5sum -s -c $file.sum || echo "GUEST-DISK-DAMAGED at $n"
    dd if=/dev/urandom of=$file bs=64k count=8 conv=fsync 2>/dev/null
    md5sum $file > $file.sum; sync; echo $n > n
done) &
n=0
while :; do
    n=$((n+1)); read -r up rest < /proc/uptime
    echo "ALIVE $n up $up writes $(cat /mnt/n 2>/dev/null)"; sleep 1
    dmesg -r -c | grep -E "$worse" | sed 's/^/KERNEL /'
done
