//! Mutual TLS 1.3 under a private authority: both sides show a certificate, and both look at the name in the other's.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::link::{LinkError, LinkErrorKind};

use super::socket::Socket;
use super::stream::{Stream, link_error};

/// What a host shows and whom it trusts.
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// Names of hosts that may send machines here. Empty: every host that the authority knows.
    allow: Vec<String>,
}

fn refused(message: impl Into<String>) -> LinkError {
    LinkError::new(LinkErrorKind::Refused, message)
}

impl Tls {
    /// Reads `cert.pem`, `key.pem` and `ca.pem`, as `ferry keys` makes them.
    pub fn from_dir(dir: &Path, allow: Vec<String>) -> Result<Tls, LinkError> {
        let path = |name: &str| dir.join(name);
        let unreadable = |name: &str, error: &dyn std::fmt::Display| {
            refused(format!(
                "{} cannot be used: {error}; `ferry keys` makes what TLS needs",
                path(name).display()
            ))
        };
        let certificates = |name: &str| -> Result<Vec<CertificateDer<'static>>, LinkError> {
            let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path(name))
                .map_err(|error| unreadable(name, &error))?
                .collect();
            let found = found.map_err(|error| unreadable(name, &error))?;
            if found.is_empty() {
                Err(unreadable(name, &"it holds no certificate"))
            } else {
                Ok(found)
            }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("ca.pem")? {
            roots.add(root).map_err(|error| unreadable("ca.pem", &error))?;
        }
        let roots = Arc::new(roots);
        let mine = certificates("cert.pem")?;
        let key =
            PrivateKeyDer::from_pem_file(path("key.pem")).map_err(|error| unreadable("key.pem", &error))?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let no_tls = |error: rustls::Error| refused(format!("TLS cannot be set up: {error}"));
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(no_tls)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(mine.clone(), key.clone_key())
            .map_err(no_tls)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| refused(format!("TLS cannot be set up: {error}")))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(no_tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(mine, key)
            .map_err(no_tls)?;
        Ok(Tls {
            client: Arc::new(client),
            server: Arc::new(server),
            allow,
        })
    }

    pub(super) fn connect(
        &self,
        socket: Socket,
        host: &str,
        stall: Duration,
    ) -> Result<TlsStream, LinkError> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| refused(format!("{host:?} is not a name that a certificate can hold")))?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name)
            .map_err(|error| refused(format!("TLS with {host} cannot begin: {error}")))?;
        TlsStream::shake_hands(Connection::Client(connection), socket, stall).map_err(|error| {
            let plain = matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            );
            let mut error = say_why(error, &format!("TLS with {host}"));
            if plain {
                error.message.push_str("; does the receiver there use --tls?");
            }
            error
        })
    }

    pub(super) fn accept(&self, socket: Socket, stall: Duration) -> Result<TlsStream, LinkError> {
        let connection = ServerConnection::new(Arc::clone(&self.server))
            .map_err(|error| refused(format!("TLS with a peer cannot begin: {error}")))?;
        TlsStream::shake_hands(Connection::Server(connection), socket, stall)
            .map_err(|error| say_why(error, "TLS with a peer"))
    }

    /// Whether the peer is one of those that may send machines here.
    pub(super) fn check_allowed(&self, stream: &TlsStream) -> Result<(), LinkError> {
        if self.allow.is_empty() {
            return Ok(());
        }
        let stranger = || {
            refused(format!(
                "the peer's certificate has none of the allowed names ({})",
                self.allow.join(", ")
            ))
        };
        let shown = stream
            .connection
            .peer_certificates()
            .and_then(<[_]>::first)
            .ok_or_else(stranger)?;
        let certificate = webpki::EndEntityCert::try_from(shown).map_err(|_| stranger())?;
        let is_named = |name: &String| {
            ServerName::try_from(name.as_str())
                .is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
        };
        if self.allow.iter().any(is_named) {
            Ok(())
        } else {
            Err(stranger())
        }
    }
}

fn say_why(error: io::Error, doing: &str) -> LinkError {
    // rustls wraps what is wrong with the other side in InvalidData.
    link_error(&format!("{doing} failed"), error)
}

enum Connection {
    Client(ClientConnection),
    Server(ServerConnection),
}

impl std::ops::Deref for Connection {
    type Target = rustls::CommonState;

    fn deref(&self) -> &Self::Target {
        match self {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        }
    }
}

pub struct TlsStream {
    connection: Connection,
    socket: Socket,
}

impl TlsStream {
    fn shake_hands(connection: Connection, mut socket: Socket, stall: Duration) -> io::Result<TlsStream> {
        socket.set_read_limit(stall)?;
        socket.set_write_limit(stall)?;
        let mut stream = TlsStream { connection, socket };
        while stream.connection.is_handshaking() {
            match &mut stream.connection {
                Connection::Client(connection) => connection.complete_io(&mut stream.socket)?,
                Connection::Server(connection) => connection.complete_io(&mut stream.socket)?,
            };
        }
        Ok(stream)
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.connection {
            Connection::Client(connection) => rustls::Stream::new(connection, &mut self.socket).read(buffer),
            Connection::Server(connection) => rustls::Stream::new(connection, &mut self.socket).read(buffer),
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.connection {
            Connection::Client(connection) => rustls::Stream::new(connection, &mut self.socket).write(buffer),
            Connection::Server(connection) => rustls::Stream::new(connection, &mut self.socket).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.connection {
            Connection::Client(connection) => rustls::Stream::new(connection, &mut self.socket).flush(),
            Connection::Server(connection) => rustls::Stream::new(connection, &mut self.socket).flush(),
        }
    }
}

impl Stream for TlsStream {
    fn set_read_limit(&mut self, limit: Duration) -> io::Result<()> {
        self.socket.set_read_limit(limit)
    }

    fn set_write_limit(&mut self, limit: Duration) -> io::Result<()> {
        self.socket.set_write_limit(limit)
    }
}
