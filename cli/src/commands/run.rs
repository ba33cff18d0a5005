//! `ferry run`: creates a machine, starts it and serves it until it ends.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use ferry_vmm::config::{
    ConfigError, CpuTemplate, DiskConfig, MachineConfig, MemoryBacking, NetConfig, SerialTarget,
};
use ferry_vmm::lifecycle::{State, StopReason};
use ferry_vmm::name::Name;
use ferry_vmm::serve;
use ferry_vmm::size::ByteSize;

use super::run_detached;
use crate::cli::Globals;
use crate::failure::Usage;
use crate::logging;
use crate::terminal::RawTerminal;

/// Run a machine
///
/// Without --kernel it is the guest that Ferry brings along: it boots in a moment, works as its command line says, and
/// reports on the serial port as JSON lines. In a terminal the serial port is here; Ctrl-] ends the machine.
///
/// The exit code is 0 when the guest powered off, asked for a reset or was ended by a command, the guest's own code when
/// it wrote to the debug-exit port, and 1 when it failed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry run hello\n  \
    ferry run hello --cmdline 'work=allocator memory=64M rate=4000' --cpus 2 --memory 512M\n  \
    ferry run web --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' \\\n      \
        --disk path=web.img --net bridge=br0 --memory 2G --detach\n  \
    ferry run web --config web.json        # what `ferry info web --json` shows under \"config\"")]
pub struct RunArgs {
    /// What to call it: lower-case letters, digits, '.', '_', '-'
    pub name: Name,
    /// An ELF image with a PVH note (vmlinux) or a bzImage [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk for the kernel
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// How many CPUs [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub cpus: Option<u32>,
    /// How much memory, such as 512M or 2G [default: 256M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory: Option<ByteSize>,
    /// Guest memory from anonymous memory or from a memfd, which other processes can map [default: anonymous]
    #[arg(long, value_name = "KIND", value_parser = memory_backing)]
    pub memory_backing: Option<MemoryBacking>,
    /// Guest memory on 2 MiB pages that the host has reserved; transparent huge pages are asked for in any case
    #[arg(long)]
    pub hugepages: bool,
    /// Touch all guest memory before the start
    #[arg(long)]
    pub prepopulate: bool,
    /// When the machine crosses, track the guest's writes by dirty rings, one for each CPU, instead of the dirty log
    ///
    /// Each CPU then notes the pages it writes in a ring of so many entries (a power of two, 65536 without a number), and
    /// waits while a full one is emptied. Which CPU writes how much is known exactly. Each side of a crossing tracks in
    /// its own way: `ferry receive` has the same option.
    #[arg(long, value_name = "ENTRIES", num_args = 0..=1, require_equals = true, default_missing_value = "65536")]
    pub dirty_ring: Option<u32>,
    /// Which CPU features the guest may see: host, x86-64-v2, x86-64-v3 or a JSON file [default: host]
    #[arg(long, value_name = "T")]
    pub cpu_template: Option<CpuTemplate>,
    /// Where the serial port goes: stdio, file=PATH, socket=PATH or null [default: stdio; with --detach null]
    ///
    /// In any case `ferry console` reaches it, and `ferry logs --serial` shows what it said.
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<SerialTarget>,
    /// A virtio console beside the serial port, and where it goes, as for --serial
    #[arg(long, value_name = "WHERE")]
    pub console: Option<SerialTarget>,
    /// A disk: path=FILE[,format=raw|qcow2|auto][,readonly][,cache=writeback|writethrough|direct][,engine=auto|io-uring|threads][,bandwidth=SIZE][,iops=N][,serial=TEXT][,queues=N]; may be given again
    #[arg(long, value_name = "SPEC")]
    pub disk: Vec<DiskConfig>,
    /// A network device: tap=NAME (made if it is not there) or bridge=NAME (a new TAP in that bridge) [,mac=ADDRESS][,queues=N][,bandwidth=SIZE][,pps=N]; may be given again
    #[arg(long, value_name = "SPEC")]
    pub net: Vec<NetConfig>,
    /// A source of randomness for the guest
    #[arg(long)]
    pub rng: bool,
    /// A balloon: memory the guest does not use is given back to the host
    #[arg(long)]
    pub balloon: bool,
    /// Everything of the above from a JSON file; what is given on the command line goes before it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Run in the background; returns when the machine runs, or says why it does not
    #[arg(long)]
    pub detach: bool,
}

fn memory_backing(text: &str) -> Result<MemoryBacking, String> {
    match text {
        "anonymous" => Ok(MemoryBacking::Anonymous),
        "memfd" => Ok(MemoryBacking::Memfd),
        other => Err(format!("{other:?} is neither anonymous nor memfd")),
    }
}

pub fn run(args: &RunArgs, globals: &Globals) -> Result<ExitCode> {
    let mut config = configuration(args)?;
    config.validate()?;
    if args.detach && [Some(&config.serial), config.console.as_ref()].contains(&Some(&SerialTarget::Stdio)) {
        bail!(Usage("a detached machine has no stdio; leave --serial away and use `ferry console`, or give file= or socket=".into()));
    }
    make_absolute(&mut config)?;
    let base = globals.base()?;
    if args.detach && !run_detached::is_child() {
        return run_detached::start(&args.name);
    }
    let foreground = !args.detach;
    let dir = base.claim(&args.name)?;
    logging::init(globals, Some(&dir.log()), foreground)?;
    if !foreground {
        run_detached::leave_session()?;
    }
    let mut terminal = None;
    let end = serve::run(dir, &config, || {
        if !foreground {
            run_detached::announce();
        } else if config.serial == SerialTarget::Stdio || config.console == Some(SerialTarget::Stdio) {
            terminal = RawTerminal::enter().unwrap_or_default();
            if terminal.is_some() {
                eprintln!("ferry: {} runs; Ctrl-] ends it", args.name);
            }
        }
    });
    drop(terminal);
    exit(&args.name, &end?, foreground)
}

fn exit(name: &Name, end: &State, foreground: bool) -> Result<ExitCode> {
    match end {
        State::Failed { message } => bail!("the machine {name} failed: {message}"),
        State::Stopped {
            reason: StopReason::DebugExit { code },
        } => Ok(ExitCode::from(u8::try_from(*code).unwrap_or(u8::MAX))),
        end => {
            if foreground {
                eprintln!("ferry: {name} {end}");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The file first, the command line over it.
fn configuration(args: &RunArgs) -> Result<MachineConfig> {
    let RunArgs {
        name: _,
        kernel,
        initrd,
        cmdline,
        cpus,
        memory,
        memory_backing,
        hugepages,
        prepopulate,
        dirty_ring,
        cpu_template,
        serial,
        console,
        disk,
        net,
        rng,
        balloon,
        config: file,
        detach,
    } = args;
    let mut config = MachineConfig::default();
    let mut file_has_serial = false;
    if let Some(path) = file {
        config = MachineConfig::from_json_file(path)?;
        file_has_serial = names_serial(path);
    }
    if !file_has_serial {
        config.serial = if *detach {
            SerialTarget::Null
        } else {
            SerialTarget::Stdio
        };
    }
    if let Some(kernel) = kernel {
        config.kernel = Some(kernel.clone());
    }
    if let Some(initrd) = initrd {
        config.initrd = Some(initrd.clone());
    }
    if let Some(console) = console {
        config.console = Some(console.clone());
    }
    over(&mut config.cmdline, cmdline);
    over(&mut config.cpus, cpus);
    over(&mut config.memory, memory);
    over(&mut config.memory_backing, memory_backing);
    over(&mut config.cpu_template, cpu_template);
    over(&mut config.serial, serial);
    config.hugepages |= hugepages;
    config.prepopulate |= prepopulate;
    config.dirty_ring = dirty_ring.or(config.dirty_ring);
    config.rng |= rng;
    config.balloon |= balloon;
    config.disks.extend(disk.iter().cloned());
    config.nets.extend(net.iter().cloned());
    Ok(config)
}

fn over<T: Clone>(into: &mut T, given: &Option<T>) {
    if let Some(value) = given {
        *into = value.clone();
    }
}

/// The file was read well once; here only whether it says where the serial port goes.
fn names_serial(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|value| value.get("serial").is_some())
}

/// So that the configuration means the same from any folder, and a detached machine holds none.
fn make_absolute(config: &mut MachineConfig) -> Result<(), ConfigError> {
    let MachineConfig {
        cpus: _,
        memory: _,
        memory_backing: _,
        hugepages: _,
        prepopulate: _,
        dirty_ring: _,
        kernel,
        initrd,
        cmdline: _,
        cpu_template,
        serial,
        disks,
        nets: _,
        rng: _,
        balloon: _,
        console,
    } = config;
    let template = match cpu_template {
        CpuTemplate::File(path) => Some(path),
        CpuTemplate::Host | CpuTemplate::X86_64V2 | CpuTemplate::X86_64V3 => None,
    };
    let ends = [Some(serial), console.as_mut()]
        .into_iter()
        .flatten()
        .filter_map(|target| match target {
            SerialTarget::File(path) | SerialTarget::Socket(path) => Some(path),
            SerialTarget::Stdio | SerialTarget::Null => None,
        });
    let disks = disks.iter_mut().map(|disk| &mut disk.path);
    for path in [kernel.as_mut(), initrd.as_mut(), template]
        .into_iter()
        .flatten()
        .chain(ends)
        .chain(disks)
    {
        *path = std::path::absolute(&*path)
            .map_err(|error| ConfigError(format!("{:?} is not a path: {error}", path.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn configured(words: &[&str]) -> Result<MachineConfig> {
        let words = ["ferry", "run", "web"].iter().chain(words);
        let crate::cli::Command::Run(args) = crate::cli::Cli::try_parse_from(words)?.command else {
            panic!()
        };
        configuration(&args)
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.json");
        std::fs::write(
            &file,
            r#"{"cpus":3,"memory":"1G","cmdline":"a=b","disks":[{"path":"one.img"}],"rng":true}"#,
        )
        .unwrap();
        let file = file.to_str().unwrap();
        let config = configured(&["--config", file, "--cpus", "2", "--disk", "two.img"]).unwrap();
        assert_eq!(
            (config.cpus, config.memory, config.cmdline.as_str()),
            (2, ByteSize(1 << 30), "a=b")
        );
        assert_eq!(config.disks.len(), 2);
        assert!(config.rng && !config.balloon);
        assert_eq!(config.serial, SerialTarget::Stdio);
    }

    #[test]
    fn a_dirty_ring_has_a_size_of_its_own_if_none_is_given() {
        assert_eq!(configured(&[]).unwrap().dirty_ring, None);
        assert_eq!(configured(&["--dirty-ring"]).unwrap().dirty_ring, Some(65_536));
        assert_eq!(configured(&["--dirty-ring=1024"]).unwrap().dirty_ring, Some(1024));
        assert!(configured(&["--dirty-ring=many"]).is_err());
    }

    #[test]
    fn the_serial_port_is_here_unless_somebody_said_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.json");
        std::fs::write(&file, r#"{"serial":"null"}"#).unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(configured(&[]).unwrap().serial, SerialTarget::Stdio);
        assert_eq!(configured(&["--detach"]).unwrap().serial, SerialTarget::Null);
        assert_eq!(
            configured(&["--config", file]).unwrap().serial,
            SerialTarget::Null
        );
        assert_eq!(
            configured(&["--config", file, "--serial", "stdio"])
                .unwrap()
                .serial,
            SerialTarget::Stdio
        );
    }

    #[test]
    fn every_path_becomes_absolute() {
        let mut config = configured(&[
            "--kernel",
            "k",
            "--initrd",
            "i",
            "--cpu-template",
            "./t.json",
            "--serial",
            "file=s",
            "--console",
            "socket=c",
            "--disk",
            "d.img",
        ])
        .unwrap();
        make_absolute(&mut config).unwrap();
        let here = std::env::current_dir().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(text.matches(here.to_str().unwrap()).count(), 6, "{text}");
    }
}
