//! What a probe asks: `tcp:HOST:PORT`, `udp:HOST:PORT`, `icmp:HOST` or an `http://` URL.

use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeTarget {
    /// A connection is made and closed.
    Tcp(SocketAddr),
    /// A datagram that must come back as it was.
    Udp(SocketAddr),
    Icmp(IpAddr),
    Http(HttpUrl),
}

/// A plain-text URL whose host has been looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUrl {
    pub address: SocketAddr,
    /// As it stands in the URL, for the Host header.
    pub host: String,
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TargetError(String);

fn resolve(text: &str) -> Result<SocketAddr, TargetError> {
    text.to_socket_addrs()
        .map_err(|e| {
            TargetError(format!(
                "{text:?} is not an address HOST:PORT that can be found: {e}"
            ))
        })?
        .next()
        .ok_or_else(|| TargetError(format!("{text:?} has no address")))
}

impl FromStr for HttpUrl {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let rest = text
            .strip_prefix("http://")
            .ok_or_else(|| TargetError(format!("{text:?} is not an http:// URL")))?;
        let (host, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        if host.is_empty() || path.contains(|c: char| c.is_ascii_control() || c == ' ') {
            return Err(TargetError(format!("{text:?} is not an http:// URL")));
        }
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
        let address = if has_port {
            resolve(host)?
        } else {
            resolve(&format!("{host}:80"))?
        };
        Ok(HttpUrl {
            address,
            host: host.to_owned(),
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.host, self.path)
    }
}

impl FromStr for ProbeTarget {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        match text.split_once(':') {
            Some(("tcp", address)) => resolve(address).map(ProbeTarget::Tcp),
            Some(("udp", address)) => resolve(address).map(ProbeTarget::Udp),
            Some(("icmp", host)) => match host.parse() {
                Ok(ip) => Ok(ProbeTarget::Icmp(ip)),
                Err(_) => resolve(&format!("{host}:0")).map(|address| ProbeTarget::Icmp(address.ip())),
            },
            Some(("http", rest)) if rest.starts_with("//") => text.parse().map(ProbeTarget::Http),
            Some(("http", url)) => url.parse().map(ProbeTarget::Http),
            _ => Err(TargetError(format!(
                "{text:?} is nothing that can be probed; use tcp:HOST:PORT, udp:HOST:PORT, icmp:HOST or http://HOST/PATH"
            ))),
        }
    }
}

impl fmt::Display for ProbeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeTarget::Tcp(address) => write!(f, "tcp:{address}"),
            ProbeTarget::Udp(address) => write!(f, "udp:{address}"),
            ProbeTarget::Icmp(ip) => write!(f, "icmp:{ip}"),
            ProbeTarget::Http(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_and_written_as_the_user_writes_them() {
        for text in [
            "tcp:127.0.0.1:80",
            "udp:[::1]:7",
            "icmp:192.0.2.1",
            "http://127.0.0.1:8080/a?b=c",
        ] {
            assert_eq!(text.parse::<ProbeTarget>().unwrap().to_string(), text);
        }
        let bare: HttpUrl = "http://127.0.0.1".parse().unwrap();
        assert_eq!((bare.address.port(), bare.path.as_str()), (80, "/"));
        assert_eq!(
            "http:http://127.0.0.1/x"
                .parse::<ProbeTarget>()
                .unwrap()
                .to_string(),
            "http://127.0.0.1/x"
        );
        let six: HttpUrl = "http://[::1]/".parse().unwrap();
        assert_eq!(six.address.to_string(), "[::1]:80");
    }

    #[test]
    fn nonsense_is_named() {
        for text in [
            "",
            "tcp",
            "tcp:127.0.0.1",
            "ftp://x",
            "http:",
            "http:///x",
            "icmp:",
            "http://127.0.0.1/a b",
        ] {
            assert!(text.parse::<ProbeTarget>().is_err(), "{text:?} was accepted");
        }
    }
}
