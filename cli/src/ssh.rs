//! A receiver at the other end of ssh: the user's own ssh with the user's own keys, nothing to configure there and
//! nothing left open. The machine's process talks to a private socket here; bytes go through in both directions.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// `ssh://[USER@]HOST[:PORT]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshDestination {
    /// As ssh takes it: `USER@HOST` or `HOST`.
    pub host: String,
    pub port: Option<u16>,
}

impl FromStr for SshDestination {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || format!("{text:?} is not a destination; write ssh://[USER@]HOST[:PORT]");
        let rest = text
            .strip_prefix("ssh://")
            .with_context(wrong)?
            .trim_end_matches('/');
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') && !port.contains(']') => {
                (host, Some(port.parse().with_context(wrong)?))
            }
            _ => (rest, None),
        };
        let bare = host.replace(['[', ']'], "");
        // A name that begins with a dash would be an option to ssh.
        let name = bare.rsplit('@').next().unwrap_or_default();
        if name.is_empty()
            || bare.starts_with('-')
            || name.starts_with('-')
            || bare.contains(char::is_whitespace)
        {
            bail!(wrong());
        }
        Ok(SshDestination { host: bare, port })
    }
}

/// A running ssh and the socket that leads to it. Dropping it ends both.
pub struct Tunnel {
    ssh: Child,
    dir: PathBuf,
    relay: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Starts `receiver` (a command line for the other host's shell) over ssh. `program` is ssh, or what stands in.
    pub fn open(program: &str, to: &SshDestination, receiver: &str) -> Result<Tunnel> {
        let mut command = Command::new(program);
        if let Some(port) = to.port {
            command.args(["-p", &port.to_string()]);
        }
        // No terminal, no agent and no forwarding: only the pipe.
        command.args([
            "-T",
            "-a",
            "-x",
            "-o",
            "ServerAliveInterval=5",
            "--",
            &to.host,
            receiver,
        ]);
        let mut ssh = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start {program}; is it installed?"))?;
        let (Some(to_there), Some(from_there)) = (ssh.stdin.take(), ssh.stdout.take()) else {
            bail!("{program} was started without its pipes");
        };
        let dir = private_dir()?;
        let listener =
            UnixListener::bind(dir.join("pipe")).context("could not make a socket for the tunnel")?;
        let relay = std::thread::Builder::new()
            .name("ferry-ssh".into())
            .spawn(move || relay(&listener, to_there, from_there))
            .context("could not start the tunnel's thread")?;
        Ok(Tunnel {
            ssh,
            dir,
            relay: Some(relay),
        })
    }

    /// Where the machine's process connects, once.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("pipe")
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // Whoever still waits in accept is let go.
        let _ = UnixStream::connect(self.socket());
        let _ = std::fs::remove_dir_all(&self.dir);
        // What was said last arrives: the receiver there lets go of the pipe when it has heard it. (ssh itself stays as long
        // as the receiver's process, and that is the machine's.)
        let done = |ssh: &mut Child, relay: &Option<JoinHandle<()>>| {
            !matches!(ssh.try_wait(), Ok(None)) || relay.as_ref().is_none_or(JoinHandle::is_finished)
        };
        within(GRACE, || done(&mut self.ssh, &self.relay));
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
        // Something that ssh started (a command that leads to the host, a shared connection) may live on and hold its
        // pipes open. Nobody waits for that: the thread ends with this process.
        if let Some(relay) = self.relay.take()
            && within(GRACE, || relay.is_finished())
        {
            let _ = relay.join();
        }
    }
}

/// How long what should end by itself may take.
const GRACE: Duration = Duration::from_secs(3);

fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn private_dir() -> Result<PathBuf> {
    let base = std::env::temp_dir();
    for attempt in 0..100u32 {
        let dir = base.join(format!("ferry-ssh-{}-{attempt}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("could not make {}", dir.display())),
        }
    }
    bail!("could not make a private folder in {}", base.display())
}

fn relay(listener: &UnixListener, mut to_there: impl Write + Send, mut from_there: impl Read + Send) {
    let Ok((near, _)) = listener.accept() else { return };
    std::thread::scope(|scope| {
        let out = &near;
        scope.spawn(move || {
            let _ = pump(out, &mut to_there);
            drop(to_there);
        });
        let _ = pump(&mut from_there, &mut &near);
        let _ = near.shutdown(Shutdown::Both);
    });
}

fn pump(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        to.flush()?;
    }
}

/// A path, as one word for a shell.
pub fn shell_word(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_options_in_disguise_are_not() {
        let parse = |text: &str| text.parse::<SshDestination>();
        assert_eq!(
            parse("ssh://beta").unwrap(),
            SshDestination {
                host: "beta".into(),
                port: None
            }
        );
        assert_eq!(parse("ssh://me@beta.lan:2222").unwrap().port, Some(2222));
        assert_eq!(
            parse("ssh://me@[::1]:22").unwrap(),
            SshDestination {
                host: "me@::1".into(),
                port: Some(22)
            }
        );
        for bad in [
            "ssh://",
            "ssh://-oProxyCommand=x",
            "ssh://me@-x",
            "ssh://a b",
            "tcp://a:1",
            "ssh://a:b",
            "ssh://@",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(shell_word(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }

    /// `sh` in place of ssh: the words for ssh come as arguments, the last one is the receiver's command.
    fn tunnel(dir: &Path, script: &str) -> Tunnel {
        let program = dir.join("ssh");
        let script = format!("#!/bin/sh\nfor last; do :; done\n{script}\n");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let to = SshDestination {
            host: "beta".into(),
            port: Some(1),
        };
        Tunnel::open(program.to_str().unwrap(), &to, "tr a-z A-Z").unwrap()
    }

    #[test]
    fn bytes_go_both_ways_and_the_end_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let tunnel = tunnel(dir.path(), "exec sh -c \"$last\"");
        let socket = tunnel.socket();
        let mut near = UnixStream::connect(&socket).unwrap();
        near.write_all(b"ferry").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "FERRY");
        drop(tunnel);
        assert!(!socket.exists());
    }

    #[test]
    fn what_ssh_leaves_behind_or_an_ssh_that_does_not_end_is_not_waited_for() {
        for script in [
            // Holds the pipes open for much longer than ssh lives.
            "sleep 60 & echo $! > ${0}.pid; exec sh -c \"$last\"",
            // Does not mind that nothing more will come.
            "echo $$ > ${0}.pid; exec sleep 60",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let tunnel = tunnel(dir.path(), script);
            let near = UnixStream::connect(tunnel.socket()).unwrap();
            let pid = dir.path().join("ssh.pid");
            assert!(within(Duration::from_secs(30), || {
                std::fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n'))
            }));
            let begun = Instant::now();
            drop(near);
            drop(tunnel);
            assert!(begun.elapsed() < Duration::from_secs(30), "{script}");
            let _ = Command::new("kill")
                .arg(std::fs::read_to_string(&pid).unwrap().trim())
                .status();
        }
    }
}
