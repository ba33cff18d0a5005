//! Another host's shell, as `ferry migrate ssh://…` finds it: a real sshd with keys and a port of its own where there is one,
//! and always a program that stands in for ssh.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::host::{Host, PATIENCE, ferry_binary};

/// A way to `there`.
pub struct Shell {
    /// The ssh to use, as a command that knows where the host is.
    ssh: PathBuf,
    /// What ferry is called there.
    remote: String,
    sshd: Option<Child>,
    _dir: tempfile::TempDir,
}

impl Shell {
    /// Every way there is; the reason is printed where there is no sshd.
    pub fn ways(there: &Host) -> Vec<Shell> {
        let mut ways = vec![Shell::stands_in(there)];
        match Shell::real(there) {
            Ok(real) => ways.push(real),
            Err(why) => eprintln!("only with a program in place of ssh: {why}"),
        }
        ways
    }

    fn new(there: &Host, dir: tempfile::TempDir, script: &str) -> Shell {
        let ssh = dir.path().join("ssh");
        executable(&ssh, script);
        let (ferry, base) = (ferry_binary().display(), there.base().path().display());
        Shell {
            remote: format!("env FERRY_RUNTIME_DIR={base} {ferry}"),
            ssh,
            sshd: None,
            _dir: dir,
        }
    }

    /// The last argument of ssh is the command for the other host. As with an sshd, it lives on when ssh is killed, and ssh's
    /// output ends when the command lets go of it.
    fn stands_in(there: &Host) -> Shell {
        let dir = folder();
        let script = "#!/bin/sh\nfor last; do :; done\nexec 3<&0\n{ (exec $last <&3 3<&-) | cat; } &\n\
                      exec >&- 3<&-\nwait\n";
        Shell::new(there, dir, script)
    }

    fn real(there: &Host) -> Result<Shell, String> {
        let sshd = Path::new("/usr/sbin/sshd");
        if !sshd.exists() || !Path::new("/run/sshd").is_dir() {
            return Err("there is no sshd here".into());
        }
        if !rustix::process::geteuid().is_root() {
            return Err("a second sshd needs root".into());
        }
        let dir = folder();
        let at = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)])
                .status();
            if !made.is_ok_and(|status| status.success()) {
                return Err("ssh-keygen makes no keys".into());
            }
        }
        let port = free_port().ok_or("there is no free port")?;
        let server = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
             UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            at("host"),
            at("user.pub")
        );
        fs::write(at("sshd_config"), server).map_err(|error| error.to_string())?;
        let client = format!(
            "Host *\nPort {port}\nHostName 127.0.0.1\nUser root\nIdentityFile {}\nIdentitiesOnly yes\n\
             StrictHostKeyChecking no\nUserKnownHostsFile {}\nLogLevel ERROR\n",
            at("user"),
            at("known_hosts")
        );
        fs::write(at("config"), client).map_err(|error| error.to_string())?;
        let log = fs::File::create(at("log")).map_err(|error| error.to_string())?;
        let child = Command::new(sshd)
            .args(["-D", "-e", "-f", &at("sshd_config")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| error.to_string())?;
        let script = format!("#!/bin/sh\nexec ssh -F {} \"$@\"\n", at("config"));
        let mut shell = Shell::new(there, dir, &script);
        shell.sshd = Some(child);
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "sshd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(shell)
    }

    /// For `ferry migrate` and `ferry resolve`.
    pub fn words(&self) -> [&str; 4] {
        let ssh = self.ssh.to_str().expect("a path in the temporary folder");
        ["--ssh", ssh, "--remote-ferry", &self.remote]
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if let Some(sshd) = &mut self.sshd {
            let _ = sshd.kill();
            let _ = sshd.wait();
        }
    }
}

/// None that the kernel gives to whoever asks for any: those come and go until sshd has taken this one.
fn free_port() -> Option<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let mine = (std::process::id() % 9_000) as u16;
    (0..9_000)
        .map(|_| 20_000 + (mine + NEXT.fetch_add(1, Ordering::Relaxed)) % 9_000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("fysh").tempdir_in("/tmp");
    folder.expect("a temporary folder")
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .expect("a script can be written");
}
