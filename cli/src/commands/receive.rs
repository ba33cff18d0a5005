//! `ferry receive`: waits for machines that come, and becomes their process.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use ferry_migration::cost::parse_duration;
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::receiver::ReceiveOptions;
use ferry_migration::transport::{Address, Listener, Tls};
use ferry_vmm::config::{self, DiskFormat, SerialTarget};
use ferry_vmm::crossing::{Allowed, Reception, arrive};
use ferry_vmm::kvm;
use ferry_vmm::lifecycle::State;
use ferry_vmm::name::Name;
use ferry_vmm::size::ByteSize;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::run_detached;
use crate::cli::Globals;
use crate::failure::Usage;
use crate::{logging, say};

/// How long a peer that is in the middle of something may make no progress.
const STALL: Duration = Duration::from_secs(10);
/// Tells the child that its standard input is the socket to listen at; its arguments are the parent's.
const CHILD: &str = "FERRY_RECEIVER_CHILD";

/// Wait for machines that another host sends
///
/// ADDRESS is tcp://HOST:PORT or unix:PATH. Without --tls only this host and its users can reach it: loopback addresses
/// and Unix sockets. A machine that has come runs in a process of its own, as if it had been started here with --detach.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry receive tcp://127.0.0.1:7070 --dir /var/lib/images\n  \
    ferry receive tcp://0.0.0.0:7070 --tls /etc/ferry --allow alpha.lan\n  \
    ferry receive unix:/run/ferry-in --once --serial stdio")]
pub struct ReceiveArgs {
    /// Where to listen: tcp://HOST:PORT or unix:PATH
    #[arg(required_unless_present = "stdio")]
    pub address: Option<Address>,
    /// Take one machine from standard input and output: what `ferry migrate ssh://...` starts
    #[arg(long, conflicts_with_all = ["address", "tls"])]
    pub stdio: bool,
    /// Where disk images are made
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// What disk images become: raw or qcow2 [default: what they were]
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<DiskFormat>,
    /// An image that both hosts have: what the disks share with it need not travel
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Take one machine, and end when it ends
    #[arg(long)]
    pub once: bool,
    /// Where the machine's serial port goes: stdio (with --once), file=PATH, socket=PATH or null
    #[arg(long, value_name = "WHERE", default_value = "null")]
    pub serial: SerialTarget,
    /// As for `ferry run`, for the machines that come
    #[arg(long, value_name = "ENTRIES", num_args = 0..=1, require_equals = true, default_missing_value = "65536")]
    pub dirty_ring: Option<u32>,
    /// Connect network devices to this bridge, instead of the one they name
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// What to call the machine here [default: its own name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// TLS with this host's keys, a folder that `ferry keys` made
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// A host that may send machines, by the name in its certificate; may be given again [default: all that the authority knows]
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub allow: Vec<String>,
    /// Listen at an address that others can reach, without any protection
    #[arg(long, conflicts_with = "tls")]
    pub insecure_plaintext: bool,
    /// How long to wait for a broken link to come back before a machine that is coming is given up
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub reconnect: Duration,
    /// The most memory a machine may have
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<ByteSize>,
    /// The most disk space a machine may have
    #[arg(long, value_name = "SIZE")]
    pub max_disk: Option<ByteSize>,
    /// The most CPUs a machine may have
    #[arg(long, value_name = "N")]
    pub max_cpus: Option<u32>,
}

fn format(text: &str) -> Result<DiskFormat, String> {
    match text {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!("{text:?} is none of raw, qcow2")),
    }
}

impl ReceiveArgs {
    fn reception(&self, globals: &Globals) -> Result<Reception> {
        let absolute = |path: &PathBuf| {
            std::path::absolute(path).with_context(|| format!("could not find {}", path.display()))
        };
        let dir = absolute(&self.dir)?;
        if !dir.is_dir() {
            return Err(Usage(format!("{} is not a folder; name one with --dir", dir.display())).into());
        }
        if let Some(image) = self.base.as_ref().filter(|image| !image.exists()) {
            return Err(Usage(format!("there is no image {} for --base", image.display())).into());
        }
        Ok(Reception {
            base: globals.base()?,
            dir,
            format: self.format,
            base_image: self.base.as_ref().map(absolute).transpose()?,
            serial: self.serial.clone(),
            dirty_ring: self.dirty_ring,
            bridge: self.bridge.clone(),
            name: self.name.clone(),
            allowed: Allowed {
                memory_bytes: self.max_memory.map(|size| size.0),
                disk_bytes: self.max_disk.map(|size| size.0),
                cpus: self.max_cpus,
            },
        })
    }

    fn tls(&self) -> Result<Option<Tls>> {
        self.tls
            .as_ref()
            .map(|dir| Tls::from_dir(dir, self.allow.clone()))
            .transpose()
            .map_err(|error| anyhow!("{error}"))
    }

    fn listen(&self) -> Result<Listener> {
        let address = self
            .address
            .as_ref()
            .ok_or_else(|| Usage("where to listen is missing".into()))?;
        if self.tls.is_some() && matches!(address, Address::Unix(_)) {
            return Err(
                Usage("TLS needs a host's name, and a Unix socket has none; leave --tls out".into()).into(),
            );
        }
        if self.tls.is_none() && !address.is_local() {
            if !self.insecure_plaintext {
                return Err(Usage(format!(
                    "others can reach {address}: protect it with --tls DIR (`ferry keys` makes the keys), or say --insecure-plaintext"
                ))
                .into());
            }
            eprintln!("warning: whoever reaches {address} can send machines here and read those that come");
        }
        Listener::bind(address, self.tls()?, STALL).map_err(|error| anyhow!("{error}"))
    }
}

pub fn run(args: &ReceiveArgs, globals: &Globals) -> Result<ExitCode> {
    logging::init(globals, None, true)?;
    if let Some(entries) = args.dirty_ring {
        config::check_dirty_ring(entries)?;
        kvm::ring::check(&kvm::Capabilities::probe(&kvm::open()?)?, entries)?;
    }
    if args.serial == SerialTarget::Stdio && !args.once {
        return Err(Usage("--serial stdio is for one machine: add --once".into()).into());
    }
    // What is wrong with it is said before anybody is waited for.
    args.reception(globals)?;
    if args.stdio {
        return one_by_stdio(args, globals);
    }
    if std::env::var_os(CHILD).is_some() {
        return one_for_the_parent(args, globals);
    }
    let listener = args.listen()?;
    let address = listener.address().context("could not tell where it listens")?;
    if args.once {
        eprintln!("waiting for a machine at {address}");
        let connections = arrive::connections(listener)?;
        return serve_one(args, globals, connections, &AtomicBool::new(false), |name| {
            eprintln!("{name} is here and runs")
        });
    }
    eprintln!("waiting for machines at {address}");
    many(&listener)
}

/// Receives one machine on the given connections and serves it to its end.
fn serve_one(
    args: &ReceiveArgs,
    globals: &Globals,
    connections: arrive::Connections,
    stop: &AtomicBool,
    taken: impl FnOnce(&Name),
) -> Result<ExitCode> {
    let options = ReceiveOptions {
        reconnect_for: args.reconnect,
        ..ReceiveOptions::default()
    };
    let (received, arrived) = arrive::one(args.reception(globals)?, connections, stop, &options)?;
    let Some(arrived) = arrived else {
        if args.stdio && received.session.is_none() {
            // Whoever started this only asked, and has heard the answer.
            return Ok(ExitCode::SUCCESS);
        }
        return Err(none_came(received.reason));
    };
    taken(&arrived.serving.control().name.clone());
    match arrived.serving.wait() {
        State::Failed { message } => Err(anyhow!("{message}")),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Why no machine came, and where it is.
fn none_came(reason: Option<Reason>) -> anyhow::Error {
    match reason {
        Some(reason) if reason.cause == Cause::Ended => {
            anyhow!("no machine came: {reason}; it ended at the other side and runs nowhere")
        }
        Some(reason) => anyhow!("no machine came: {reason}; the machine is at the other side"),
        None => anyhow!("no machine came; the machine is at the other side"),
    }
}

fn one_by_stdio(args: &ReceiveArgs, globals: &Globals) -> Result<ExitCode> {
    // The session that ssh began ends with it; the machine does not.
    let _ = rustix::process::setsid();
    let owned = |fd: std::io::Result<OwnedFd>| {
        fd.map(std::fs::File::from)
            .context("could not use standard input and output")
    };
    let reader = owned(std::io::stdin().as_fd().try_clone_to_owned())?;
    let writer = owned(std::io::stdout().as_fd().try_clone_to_owned())?;
    let connections = arrive::pipe_connections(reader, writer, STALL)?;
    serve_one(args, globals, connections, &AtomicBool::new(false), |_| {
        run_detached::let_go()
    })
}

/// One process after the other waits for a machine; all listen at the same socket, which is handed on.
fn many(listener: &Listener) -> Result<ExitCode> {
    let mut early = 0;
    loop {
        let began = Instant::now();
        let socket: OwnedFd = listener
            .as_fd()
            .try_clone_to_owned()
            .context("could not hand the socket on")?;
        let mut child = Command::new(std::env::current_exe().context("could not find the ferry program")?)
            .args(std::env::args_os().skip(1))
            .env(CHILD, "1")
            .stdin(Stdio::from(socket))
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start a process for the next machine")?;
        let mut word = String::new();
        if let Some(pipe) = child.stdout.take() {
            BufReader::new(pipe)
                .read_line(&mut word)
                .context("could not hear from the machine's process")?;
        }
        match word.trim_end() {
            "" => {
                // A crossing that failed there is no reason to stop; a receiver that cannot even wait is.
                let status = child.wait().context("could not wait for the machine's process")?;
                early = if began.elapsed() < Duration::from_secs(1) {
                    early + 1
                } else {
                    0
                };
                if early >= 3 {
                    return Err(anyhow!(
                        "no machine can be received: the receiving process ends at once ({status})"
                    ));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            name => {
                say!(
                    "{name} is here (process {}); `ferry console {name}` connects",
                    child.id()
                )?;
                // It is its own master now; its end is nobody's concern but must be taken note of.
                std::thread::Builder::new()
                    .name("reaper".into())
                    .spawn(move || drop(child.wait()))
                    .context("could not start a thread")?;
            }
        }
    }
}

fn one_for_the_parent(args: &ReceiveArgs, globals: &Globals) -> Result<ExitCode> {
    // The terminal that the receiver began in ends nothing of this machine. The working folder stays: the user's paths
    // are relative to it.
    rustix::process::setsid().context("could not leave the terminal")?;
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("could not take the socket over")?;
    let unix = matches!(args.address, Some(Address::Unix(_)));
    let listener = Listener::from_socket(socket, unix, args.tls()?, STALL);
    let connections = arrive::connections(listener)?;
    let stop = Arc::new(AtomicBool::new(false));
    end_with_the_parent(stop.clone())?;
    let served = serve_one(args, globals, connections, &stop, |name| {
        let _ = writeln!(std::io::stdout(), "{name}").and_then(|()| std::io::stdout().flush());
        run_detached::let_go();
    });
    match served {
        // Nobody waits for a machine any more, and nobody asks why none came.
        Err(_) if stop.load(Ordering::Acquire) => Ok(ExitCode::FAILURE),
        served => served,
    }
}

/// The receiver that started this process holds the other end of its standard output. When it is gone, this one waits no
/// longer; a machine that is just coming still may.
fn end_with_the_parent(stop: Arc<AtomicBool>) -> Result<()> {
    let word = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context("could not use standard output")?;
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(move || {
            // Without anything to wait for, this tells only that the other end was closed.
            let mut pipe = [PollFd::new(&word, PollFlags::empty())];
            while poll(&mut pipe, None) == Err(Errno::INTR) {}
            stop.store(true, Ordering::Release);
        })
        .context("could not start a thread")?;
    Ok(())
}
