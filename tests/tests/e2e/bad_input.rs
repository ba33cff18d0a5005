//! Input that cannot be: one sentence that says what is wrong and what to do, the right exit code, nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use ferry_tests::host::{Host, PATIENCE, Ran, ferry_binary, finish, skip_without_kvm};

const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// A PVH kernel that halts for ever, with one thing changed.
pub(crate) fn elf(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut file = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    // One segment to load at 1 MiB: cli, hlt, and back.
    let segment = |kind: u32, offset: u64, address: u64, size: u64| {
        let flags = 5u32;
        let head = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        let words = [offset, address, address, size, size, 4]
            .map(u64::to_le_bytes)
            .concat();
        [head, words].concat()
    };
    put(SEGMENT, &segment(1, 0x800, 0x10_0000, 0x100));
    put(0x800, &[0xfa, 0xf4, 0xeb, 0xfc]);
    // The note that names the 32-bit entry.
    put(NOTE, &segment(4, 0x400, 0, 20));
    let note = [4u32, 4, 18].map(u32::to_le_bytes).concat();
    put(
        0x400,
        &[note, b"Xen\0".to_vec(), 0x10_0000u32.to_le_bytes().to_vec()].concat(),
    );
    change(&mut file);
    file
}

const SEGMENT: usize = 64;
const NOTE: usize = 64 + 56;
/// Fields of a program header.
const OFFSET: usize = 8;
const ADDRESS: usize = 24;
const FILE_SIZE: usize = 32;
const MEMORY_SIZE: usize = 40;

fn set(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[track_caller]
fn refused(host: &Host, what: &str, ran: &Ran, code: i32, said: &str) {
    assert_eq!(ran.code, code, "{what}: {ran:?}");
    assert_eq!(ran.stdout, "", "{what}: {ran:?}");
    let sentence = ran.stderr.trim_end();
    assert!(
        sentence.starts_with("ferry: ") && !sentence.contains('\n'),
        "{what}: {ran:?}"
    );
    assert!(sentence.contains(said), "{what} should say {said:?}: {sentence}");
    assert!(!sentence.contains("panicked"), "{what}: {sentence}");
    assert!(host.remains().is_empty(), "{what} left {:?}", host.remains());
}

/// Each is tried in the foreground and detached.
#[track_caller]
fn run_refused(host: &Host, arguments: &[&str], code: i32, said: &str) {
    let what = arguments.join(" ");
    for more in [&["--serial", "null"][..], &["--detach"]] {
        // Its own --serial is what the row is about.
        if arguments.contains(&"--serial") && more.contains(&"--serial") {
            refused(
                host,
                &what,
                &host.ferry([&["run", "bad"], arguments].concat()),
                code,
                said,
            );
        } else {
            refused(
                host,
                &what,
                &host.ferry([&["run", "bad"], more, arguments].concat()),
                code,
                said,
            );
        }
    }
}

#[test]
fn commands_that_make_no_sense() {
    let host = Host::new();
    fs::write(host.file("unknown.json"), r#"{"cpus":1,"colour":"red"}"#).unwrap();
    fs::write(host.file("broken.json"), r#"{"cpus":"#).unwrap();
    fs::write(host.file("wrong.json"), r#"{"cpus":"two"}"#).unwrap();
    fs::write(host.file("text"), "not a configuration").unwrap();
    fs::create_dir(host.file("folder")).unwrap();
    let (long, name) = ("x".repeat(3000), "n".repeat(64));
    for (arguments, said) in [
        (&["run"][..], "<NAME>"),
        (&["run", ""], "is not a name for a machine"),
        (&["run", "../up"], "is not a name for a machine"),
        (&["run", "UPPER"], "is not a name for a machine"),
        (&["run", &name], "is not a name for a machine"),
        (&["info", "no/such"], "is not a name for a machine"),
        (&["run", "bad", "--cpus", "0"], "between 1 and"),
        (&["run", "bad", "--cpus", "10000"], "10000 were asked for"),
        (&["run", "bad", "--cpus", "-1"], "invalid value '-1'"),
        (&["run", "bad", "--cpus", "many"], "invalid value 'many'"),
        (&["run", "bad", "--memory", "0"], "too little"),
        (&["run", "bad", "--memory", "1K"], "too little"),
        (&["run", "bad", "--memory", "-5M"], "is not a size"),
        (&["run", "bad", "--memory", "100000000T"], "is not a size"),
        (
            &["run", "bad", "--memory", "100000T"],
            "more than a machine can address",
        ),
        (&["run", "bad", "--memory", "67108865"], "multiple"),
        (&["run", "bad", "--initrd", "text"], "needs a kernel"),
        (&["run", "bad", "--cmdline", &long], "3000 bytes"),
        (&["run", "bad", "--cpu-template", "z80"], "no CPU template"),
        (
            &["run", "bad", "--serial", "printer"],
            "is no place for a serial port",
        ),
        (
            &["run", "bad", "--serial", "file="],
            "is no place for a serial port",
        ),
        (&["run", "bad", "--serial", "stdio", "--detach"], "has no stdio"),
        (&["run", "bad", "--console", "stdio"], "cannot both use stdio"),
        (&["run", "bad", "--disk", ""], "needs a path"),
        (&["run", "bad", "--disk", "path=x,format=vhd"], "does not know"),
        (&["run", "bad", "--disk", "path=x,queues=0"], "between 1 and 64"),
        (
            &["run", "bad", "--net", "mac=52:54:00:00:00:01"],
            "needs tap=NAME or bridge=NAME",
        ),
        (
            &["run", "bad", "--net", "tap=a/b"],
            "is not a network interface name",
        ),
        (&["run", "bad", "--net", "tap=t,mac=zz"], "is not a MAC address"),
        (&["run", "bad", "--config", "missing.json"], "cannot be read"),
        (&["run", "bad", "--config", "folder"], "cannot be read"),
        (
            &["run", "bad", "--config", "broken.json"],
            "is not a machine configuration",
        ),
        (
            &["run", "bad", "--config", "text"],
            "is not a machine configuration",
        ),
        (
            &["run", "bad", "--config", "wrong.json"],
            "is not a machine configuration",
        ),
        (
            &["run", "bad", "--config", "unknown.json"],
            "unknown field `colour`",
        ),
        (&["run", "bad", "--frobnicate"], "unexpected argument"),
        (&["run", "bad", "worse"], "unexpected argument 'worse'"),
        (&["stop", "bad", "--timeout", "soon"], "is not a duration"),
        (&["completions", "dos"], "invalid value 'dos'"),
        (&["fly"], "unrecognized subcommand"),
        (&["list", "--log", "a=b=c=d"], "is not understood"),
    ] {
        refused(&host, &arguments.join(" "), &host.ferry(arguments), USAGE, said);
    }
}

#[test]
fn machines_that_are_not_there() {
    let host = Host::new();
    for command in [
        "info", "console", "pause", "resume", "stop", "kill", "logs", "pulse",
    ] {
        refused(
            &host,
            command,
            &host.ferry([command, "ghost"]),
            FAILURE,
            "there is no machine named ghost",
        );
    }
}

#[test]
fn kernels_that_are_none() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    fs::create_dir(host.file("folder")).unwrap();
    let far = 1u64 << 40;
    let files: [(&str, Vec<u8>); 14] = [
        ("empty", Vec::new()),
        ("text", b"This is a letter to my aunt.\n".repeat(100)),
        ("zeroes", vec![0; 1 << 20]),
        ("only-magic", b"\x7fELF".to_vec()),
        ("cut-header", elf(|file| file.truncate(40))),
        ("cut-segment", elf(|file| file.truncate(0x810))),
        ("32-bit", elf(|file| file[4] = 1)),
        ("other-cpu", elf(|file| file[18] = 183)),
        ("no-note", elf(|file| file[NOTE] = 0)),
        ("headers-far", elf(|file| set(file, 32, far))),
        (
            "many-headers",
            elf(|file| file[56..58].copy_from_slice(&u16::MAX.to_le_bytes())),
        ),
        (
            "segment-far",
            elf(|file| set(file, SEGMENT + OFFSET, u64::MAX - 10)),
        ),
        (
            "segment-huge",
            elf(|file| set(file, SEGMENT + FILE_SIZE, u64::MAX)),
        ),
        ("note-far", elf(|file| set(file, NOTE + OFFSET, u64::MAX - 10))),
    ];
    for (name, bytes) in &files {
        fs::write(host.file(name), bytes).unwrap();
        run_refused(&host, &["--kernel", name], FAILURE, name);
    }
    for (name, at, value) in [
        ("outside-memory", SEGMENT + ADDRESS, far),
        ("in-device-window", SEGMENT + ADDRESS, 0xd000_0000),
        ("past-the-end", SEGMENT + ADDRESS, (256 << 20) - 4),
        ("wraps-around", SEGMENT + ADDRESS, u64::MAX - 4),
        ("needs-too-much", SEGMENT + MEMORY_SIZE, far),
    ] {
        fs::write(host.file(name), elf(|file| set(file, at, value))).unwrap();
        run_refused(&host, &["--kernel", name], FAILURE, name);
    }
    // A bzImage whose header lies.
    let mut bz = vec![0u8; 0x4000];
    bz[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x66]);
    bz[0x202..0x206].copy_from_slice(b"HdrS");
    bz[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bz[0x1f1] = 0xff;
    fs::write(host.file("bz-lies"), &bz).unwrap();
    run_refused(&host, &["--kernel", "bz-lies"], FAILURE, "bz-lies");
    run_refused(&host, &["--kernel", "missing"], FAILURE, "missing");
    run_refused(&host, &["--kernel", "folder"], FAILURE, "folder");
    run_refused(&host, &["--kernel", "/dev/zero"], FAILURE, "/dev/zero");
    fs::write(host.file("good"), elf(|_| {})).unwrap();
    run_refused(
        &host,
        &["--kernel", "good", "--initrd", "missing"],
        FAILURE,
        "missing",
    );
    run_refused(
        &host,
        &["--kernel", "good", "--initrd", "folder"],
        FAILURE,
        "folder",
    );
    let big = fs::File::create(host.file("big-initrd")).unwrap();
    big.set_len(1 << 40).unwrap();
    run_refused(
        &host,
        &["--kernel", "good", "--initrd", "big-initrd"],
        FAILURE,
        "big-initrd",
    );
}

#[test]
fn what_the_host_does_not_have() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    fs::create_dir(host.file("folder")).unwrap();
    fs::write(host.file("template.json"), "{ nonsense").unwrap();
    for (arguments, said) in [
        (&["--cpu-template", "missing.json"][..], "missing.json"),
        (&["--cpu-template", "./template.json"], "template.json"),
    ] {
        run_refused(&host, arguments, USAGE, said);
    }
    for (arguments, said) in [
        (&["--memory", "16T"][..], "memory"),
        (
            &["--serial", "file=no/such/folder/out"],
            "no/such/folder/out cannot be written",
        ),
        (&["--serial", "file=folder"], "folder cannot be written"),
        (
            &["--serial", "socket=no/such/folder/s"],
            "no/such/folder/s cannot be made",
        ),
        (&["--disk", "missing.img"], "missing.img"),
        (&["--disk", "folder"], "folder"),
        (&["--net", "bridge=nosuchbr0"], "nosuchbr0"),
    ] {
        run_refused(&host, arguments, FAILURE, said);
    }
    let reserved = fs::read_to_string("/proc/meminfo").unwrap();
    if reserved
        .lines()
        .any(|line| line.starts_with("HugePages_Free:") && line.ends_with(" 0"))
    {
        run_refused(&host, &["--hugepages"], FAILURE, "huge");
    }
}

#[test]
fn runtime_directories_that_cannot_be_written() {
    let host = Host::new();
    fs::write(host.file("file"), "").unwrap();
    let deep = format!("/tmp/{}", "d/".repeat(60));
    for (place, said) in [
        ("file", "--runtime-dir"),
        ("/proc/ferry", "--runtime-dir"),
        (&deep, "shorter --runtime-dir"),
    ] {
        let ran = host.ferry(["run", "bad", "--serial", "null", "--runtime-dir", place]);
        refused(&host, place, &ran, FAILURE, said);
    }
}

/// A shell in a mount namespace of its own, as root, where `prepare` has changed what ferry will find.
fn elsewhere(host: &Host, prepare: &str, user: Option<u32>) -> Option<Ran> {
    if !rustix::process::geteuid().is_root() {
        assert!(
            std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
            "this test needs root"
        );
        eprintln!("skipped: only root can hide /dev/kvm");
        return None;
    }
    // Where another user can reach it.
    fs::set_permissions(host.file("."), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = host.file("ferry");
    if !binary.exists() {
        fs::copy(ferry_binary(), &binary).unwrap();
    }
    let run = format!(
        "{} run bad --serial null --runtime-dir {}",
        binary.display(),
        host.base().path().display()
    );
    let run = match user {
        Some(id) => format!("exec setpriv --reuid {id} --regid {id} --clear-groups {run}"),
        None => format!("exec {run}"),
    };
    let mut shell = Command::new("unshare");
    shell
        .args(["--mount", "sh", "-ec", &format!("{prepare}\n{run}")])
        .process_group(0);
    shell
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Some(finish(shell.spawn().unwrap(), PATIENCE))
}

#[test]
fn a_host_without_kvm_or_without_the_permission_to_use_it() {
    if skip_without_kvm() {
        return;
    }
    let nobody = 65534;
    for (prepare, user, said) in [
        ("mount -t tmpfs none /dev", None, "/dev/kvm"),
        ("mount --bind /dev/null /dev/kvm", None, "/dev/kvm"),
        (
            "cp -a /dev/kvm /tmp/fy-kvm-$$; chmod 600 /tmp/fy-kvm-$$; mount --bind /tmp/fy-kvm-$$ /dev/kvm; rm /tmp/fy-kvm-$$",
            Some(nobody),
            "/dev/kvm",
        ),
    ] {
        let host = Host::new();
        let Some(ran) = elsewhere(&host, prepare, user) else {
            return;
        };
        refused(&host, prepare, &ran, FAILURE, said);
    }
}
