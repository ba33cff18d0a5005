//! An outer machine: an emulated host with a genuine `/dev/kvm`, in which tests run Ferry with stock Linux guests.
//!
//! QEMU in software emulation implements AMD's SVM with nested paging, so a stock kernel in it offers what hardware
//! offers. Two outer machines joined by a cable are two hosts in truth: two kernels, two clocks, two page caches.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// What an outer machine is to do.
pub struct Job {
    /// Shell script, run by busybox in `/p` where the files are; results go to `/out`.
    pub script: String,
    /// Files brought along, as (path here, name in `/p`). The inner kernel (vmlinux, vmlinuz) and
    /// initramfs (guest.cpio) come by themselves; guest.img is a disk.
    pub files: Vec<(PathBuf, String)>,
    pub cpus: u32,
    pub memory_mib: u32,
    pub timeout: Duration,
    /// This end of a cable to another outer machine.
    pub cable: Option<CableEnd>,
}

impl Job {
    pub fn new(script: impl Into<String>) -> Job {
        Job {
            script: script.into(),
            files: Vec::new(),
            cpus: 1,
            memory_mib: 1536,
            timeout: Duration::from_secs(120),
            cable: None,
        }
    }

    pub fn file(mut self, path: impl Into<PathBuf>, name: &str) -> Job {
        self.files.push((path.into(), name.to_owned()));
        self
    }

    pub fn cpus(mut self, cpus: u32) -> Job {
        self.cpus = cpus;
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Job {
        self.timeout = timeout;
        self
    }

    pub fn cable(mut self, end: CableEnd) -> Job {
        self.cable = Some(end);
        self
    }
}

/// One end of a virtual Ethernet cable between two outer machines.
pub struct CableEnd {
    mine: PathBuf,
    theirs: PathBuf,
    mac: &'static str,
}

/// A cable's two ends; the directory must outlive both machines.
pub fn cable(dir: &Path) -> (CableEnd, CableEnd) {
    let (a, b) = (dir.join("cable-a"), dir.join("cable-b"));
    (
        CableEnd {
            mine: a.clone(),
            theirs: b.clone(),
            mac: "52:54:00:00:0a:01",
        },
        CableEnd {
            mine: b,
            theirs: a,
            mac: "52:54:00:00:0a:02",
        },
    )
}

/// What came back from an outer machine.
pub struct Outcome {
    /// Exit code of the job's script.
    pub code: i32,
    pub console: String,
    /// The script's `/out`.
    pub out: tempfile::TempDir,
}

impl Outcome {
    /// Fails with the console's end unless the job ended with 0.
    pub fn success(self) -> Result<Outcome> {
        if self.code != 0 {
            bail!(
                "the job in the outer machine ended with {}:\n{}",
                self.code,
                tail(&self.console, 60)
            );
        }
        Ok(self)
    }

    pub fn text(&self, name: &str) -> Result<String> {
        let path = self.out.path().join(name);
        fs::read_to_string(&path)
            .with_context(|| format!("the job left no {name}; console:\n{}", tail(&self.console, 60)))
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Why outer machines cannot run here, if they cannot.
pub fn missing() -> Option<String> {
    let qemu = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !qemu.is_ok_and(|status| status.success()) {
        return Some("qemu-system-x86_64 is not installed".to_owned());
    }
    let cache = cache();
    [
        "outer.cpio",
        "guest.cpio",
        "guest.img",
        "kernel/vmlinux",
        "kernel/vmlinuz",
    ]
    .iter()
    .find(|name| !cache.join(name).exists())
    .map(|name| format!("images/linux/cache/{name} is missing; `make images` makes it"))
}

/// Where `make images` puts what it makes.
pub fn cache() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/linux/cache")
}

/// A started outer machine; dropping it ends it.
pub struct Outer {
    qemu: Child,
    work: tempfile::TempDir,
    started: Instant,
    timeout: Duration,
}

impl Drop for Outer {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Boots an outer machine, waits for its job's end, and brings back the results.
pub fn run(job: Job) -> Result<Outcome> {
    start(job)?.wait()
}

/// Boots an outer machine and returns while it works.
pub fn start(job: Job) -> Result<Outer> {
    let work = tempfile::tempdir()?;
    let payload = work.path().join("p");
    fs::create_dir(&payload)?;
    fs::write(payload.join("job.sh"), &job.script)?;
    let cache = cache().canonicalize()?;
    for (name, to) in [
        ("guest.cpio", "guest.cpio"),
        ("kernel/vmlinux", "vmlinux"),
        ("kernel/vmlinuz", "vmlinuz"),
    ] {
        std::os::unix::fs::symlink(cache.join(name), payload.join(to))?;
    }
    for (path, name) in &job.files {
        let path = path
            .canonicalize()
            .with_context(|| format!("no file {}", path.display()))?;
        std::os::unix::fs::symlink(path, payload.join(name))?;
    }
    // The payload rides behind the initramfs, as a second archive.
    let initrd = work.path().join("initrd");
    let status = Command::new("sh")
        .arg("-c")
        .arg(r#"cp "$1" initrd && find -L p | cpio -o -L -H newc --quiet >> initrd"#)
        .arg("sh")
        .arg(cache.join("outer.cpio"))
        .current_dir(work.path())
        .status()?;
    ensure!(status.success(), "could not make the outer machine's initramfs");
    let out = fs::File::create(work.path().join("out.img"))?;
    out.set_len(256 << 20)?;

    // The emulated host ends with the thread that started it, even when that is killed.
    let mut qemu = Command::new("setpriv");
    qemu.args([
        "--pdeathsig",
        "KILL",
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "EPYC,+svm,+npt",
    ])
    .args(["-smp", &job.cpus.to_string(), "-m", &job.memory_mib.to_string()])
    .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
    .args(["-bios", "/usr/share/qemu/qboot.rom"])
    .arg("-kernel")
    .arg(cache.join("kernel/vmlinuz"))
    .arg("-initrd")
    .arg(&initrd)
    .arg("-append")
    .arg(format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable tsc_early_khz={}",
        host_khz()
    ))
    .arg("-drive")
    .arg(format!(
        "if=none,id=out,file={},format=raw",
        work.path().join("out.img").display()
    ))
    .args(["-device", "virtio-blk-pci,drive=out,serial=out"])
    .args([
        "-object",
        "rng-random,id=rng,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng",
    ])
    .arg("-serial")
    .arg(format!("file:{}", work.path().join("console").display()));
    if let Some(end) = &job.cable {
        qemu.arg("-netdev")
            .arg(format!(
                "dgram,id=cable,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                end.mine.display(),
                end.theirs.display()
            ))
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=cable,romfile=,mac={}", end.mac));
    }
    // The guest's disk is attached, not copied into memory; what is written to it is forgotten.
    qemu.arg("-drive")
        .arg(format!(
            "if=none,id=guest,file={},format=raw,snapshot=on",
            cache.join("guest.img").display()
        ))
        .args(["-device", "virtio-blk-pci,drive=guest,serial=guest"]);
    qemu.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let qemu = qemu
        .spawn()
        .context("could not start qemu-system-x86_64 by setpriv")?;
    Ok(Outer {
        qemu,
        work,
        started: Instant::now(),
        timeout: job.timeout,
    })
}

impl Outer {
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.work.path().join("console")).unwrap_or_default()).into_owned()
    }

    /// Waits for the job's end. An emulated machine that hangs would hang for ever, so there is always a limit.
    pub fn wait(mut self) -> Result<Outcome> {
        loop {
            if self.qemu.try_wait()?.is_some() {
                break;
            }
            if self.started.elapsed() > self.timeout {
                bail!(
                    "the outer machine did not end within {:?}; console:\n{}",
                    self.timeout,
                    tail(&self.console(), 60)
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let console = self.console();
        let Some(code) = exit_code(&console) else {
            let mut errors = String::new();
            if let Some(stderr) = &mut self.qemu.stderr {
                let _ = stderr.read_to_string(&mut errors);
            }
            bail!(
                "the outer machine ended without its job's exit code; QEMU said: {errors}; console:\n{}",
                tail(&console, 60)
            );
        };
        let out = tempfile::tempdir()?;
        let status = Command::new("tar")
            .arg("xf")
            .arg(self.work.path().join("out.img"))
            .arg("-C")
            .arg(out.path())
            .stderr(Stdio::null())
            .status()?;
        ensure!(
            status.success(),
            "the outer machine's results could not be unpacked"
        );
        Ok(Outcome { code, console, out })
    }
}

fn exit_code(console: &str) -> Option<i32> {
    let line = console
        .lines()
        .rev()
        .find(|line| line.contains("OUTER-EXIT rc="))?;
    line.split("rc=").nth(1)?.split_whitespace().next()?.parse().ok()
}

fn host_khz() -> u64 {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info
        .lines()
        .find(|line| line.starts_with("cpu MHz"))
        .and_then(|line| line.split(':').nth(1));
    mhz.and_then(|mhz| mhz.trim().parse::<f64>().ok())
        .map_or(2_000_000, |mhz| (mhz * 1000.0) as u64)
}
