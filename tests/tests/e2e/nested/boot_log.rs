//! Judges what a stock kernel said: whatever it complains about, and is not known to be harmless here, fails the test.

/// What a kernel may complain about, and why that is not the machine's fault. Each is a part of one line.
const ALLOWED: [(&str, &str); 11] = [
    (
        "ferry: the log is read",
        "the guest's own line, which shows that its log comes out",
    ),
    (
        "reboot: Power down",
        "the last word of a guest that heard its power button",
    ),
    (
        "TSC unstable due to TSCs unsynchronized",
        "the rule for AMD processors without the invariant TSC bit, which the emulated one does not have, and more than \
         one CPU: nothing is measured. KVM's trace shows the same TSC offset written for both vCPUs",
    ),
    (
        "Speculative Return Stack Overflow:",
        "the emulated processor says that it is a Zen, and has no microcode for it",
    ),
    (
        "read-back delay",
        "the emulated processor lost its turn on a busy host between two readings of the clocks",
    ),
    ("clocksource: Long readout interval", "as above"),
    ("TSC unstable due to clocksource watchdog", "as above"),
    (
        "clocksource: Switched to clocksource",
        "what follows the one above",
    ),
    ("hrtimer: interrupt took", "a busy host under the emulator"),
    (
        "sched: DL replenish lagged too much",
        "a busy host under the emulator",
    ),
    ("perf: interrupt took too long", "a busy host under the emulator"),
];

/// Whole words of complaint, wherever they are printed.
const BAD: [&str; 4] = [
    "Kernel panic",
    "Call Trace",
    "GUEST-DISK-DAMAGED",
    "GUEST-MOUNT-FAILED",
];

/// The lines of a serial port that nobody has an excuse for: those which the guest marks as its kernel's complaints, and
/// those which the kernel prints itself in spite of `quiet`.
pub(super) fn complaints(serial: &str) -> Vec<&str> {
    serial
        .lines()
        .map(str::trim_end)
        .filter(|line| {
            let from_kernel = line.starts_with("KERNEL ") || line.starts_with('[');
            from_kernel || BAD.iter().any(|bad| line.contains(bad))
        })
        .filter(|line| !ALLOWED.iter().any(|(part, _why)| line.contains(part)))
        .collect()
}

#[test]
fn the_judge_knows_a_complaint_from_an_excuse() {
    let log = "KERNEL <4>[    0.1] ferry: the log is read\r\n\
               KERNEL <6>[    0.2] tsc: Marking TSC unstable due to TSCs unsynchronized\r\n\
               ALIVE 1 up 3.2 writes 1\r\n\
               KERNEL <6>[    0.3] tsc: Marking TSC unstable due to check_tsc_sync_source failed\r\n\
               KERNEL <4>[    0.4] clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1043321459\r\n\
               KERNEL <4>[    0.4] clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable\r\n\
               KERNEL <4>[    0.4] WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:606\r\n\
               [    9.1] EXT4-fs error (device vda): damaged\r\n\
               [    9.9] reboot: Power down\r\n\
               GUEST-DISK-DAMAGED at 7\r\n";
    let found = complaints(log);
    assert_eq!(found.len(), 5, "{found:?}");
    for (found, part) in found.iter().zip([
        "check_tsc_sync_source",
        "'tsc' as unstable",
        "xstate.c",
        "EXT4-fs error",
        "DAMAGED at 7",
    ]) {
        assert!(found.contains(part), "{found}");
    }
}
