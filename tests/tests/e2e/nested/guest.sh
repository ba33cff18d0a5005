# What a Linux guest does here: it tells what it found, serves HTTP and a connection that lasts, and writes to ext4.
for device in /sys/bus/pci/devices/*; do echo "PCI $(cat "$device/vendor") $(cat "$device/device")"; done
for device in /sys/bus/virtio/devices/*; do echo "VIRTIO $(basename "$(readlink "$device/driver")")"; done
echo "RNG $(cat /sys/class/misc/hw_random/rng_current)"
[ -c /dev/hvc0 ] && echo "CONSOLE hvc0"
mount | grep '^/dev/vda '
httpd -p 80 -h /mnt/www
printf 'n=0; while :; do n=$((n+1)); echo $n; sleep 1; done\n' > /tmp/count.sh
sh /tmp/count.sh | nc -l -p 9000 &
(n=0; while :; do
    n=$((n+1)); dd if=/dev/urandom of=/mnt/file$((n%4)) bs=64k count=8 conv=fsync 2>/dev/null; echo $n > /mnt/n
done) &
dmesg -c > /tmp/boot-log
n=0
while :; do
    n=$((n+1)); echo "ALIVE $n $(cat /mnt/n 2>/dev/null)"; sleep 1
    dmesg -c | grep -E "BUG|WARNING|rcu.*stall|lockup|unstable|hung task|I/O error|EXT4-fs error|Oops" && echo "GUEST-COMPLAINS"
done
