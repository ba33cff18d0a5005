//! Where a receiver listens: `tcp://HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::str::FromStr;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl Address {
    /// Whether only this host can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp { host, port } => match host.parse::<IpAddr>() {
                Ok(ip) => ip.is_loopback(),
                Err(_) => (host.as_str(), *port)
                    .to_socket_addrs()
                    .is_ok_and(|mut found| found.all(|address| address.ip().is_loopback())),
            },
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an address; write tcp://HOST:PORT or unix:PATH");
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err(wrong())
            } else {
                Ok(Address::Unix(path.into()))
            };
        }
        let (host, port) = text
            .strip_prefix("tcp://")
            .ok_or_else(wrong)?
            .rsplit_once(':')
            .ok_or_else(wrong)?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let port = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || host.contains('/') {
            return Err(wrong());
        }
        Ok(Address::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_the_same_way() {
        for text in [
            "tcp://10.0.0.1:7070",
            "tcp://[::1]:7070",
            "tcp://beta.lan:1",
            "unix:/run/ferry/in",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!(
            "unix:///run/in".parse::<Address>().unwrap(),
            Address::Unix("/run/in".into())
        );
        for text in [
            "",
            "tcp://",
            "tcp://:1",
            "tcp://a",
            "tcp://a:99999",
            "a:1",
            "unix:",
            "http://a:1",
            "tcp://a/b:1",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains("tcp://HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn loopback_and_unix_are_local_and_nothing_else() {
        let local = |text: &str| text.parse::<Address>().unwrap().is_local();
        assert!(
            local("tcp://127.0.0.1:1")
                && local("tcp://[::1]:1")
                && local("unix:/x")
                && local("tcp://localhost:1")
        );
        assert!(!local("tcp://0.0.0.0:1") && !local("tcp://[::]:1") && !local("tcp://192.0.2.1:1"));
    }
}
