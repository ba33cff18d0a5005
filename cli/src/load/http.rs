//! GET requests over kept connections, or over a new one for each.

use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::sync::{Mutex, PoisonError};

use ferry_network::probe::HttpUrl;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::record::{Answer, Failure};

type Connection = SendRequest<Empty<Bytes>>;

pub(super) struct HttpClient {
    url: HttpUrl,
    keep_alive: bool,
    /// All answers must be the same as the first.
    same: bool,
    first_body: Mutex<Option<(u64, u64)>>,
    idle: Mutex<Vec<Connection>>,
}

fn error(what: impl std::fmt::Display) -> Failure {
    Failure::Error(what.to_string())
}

impl HttpClient {
    pub(super) fn new(url: HttpUrl, keep_alive: bool, same: bool) -> Self {
        Self {
            url,
            keep_alive,
            same,
            first_body: Mutex::new(None),
            idle: Mutex::new(Vec::new()),
        }
    }

    pub(super) async fn ask(&self) -> Result<Answer, Failure> {
        while let Some(mut connection) = self.take_idle() {
            // A server may close a kept connection at any time; that is no failure of the service.
            if connection.ready().await.is_err() {
                continue;
            }
            match self.get(connection).await {
                Err(Failure::Error(_)) => break,
                answer => return answer,
            }
        }
        self.get(self.connect().await?).await
    }

    fn take_idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(self.url.address)
            .await
            .map_err(|e| error(format_args!("could not connect to {}: {e}", self.url.address)))?;
        // The client's own delays must not be measured.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(error)?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn get(&self, mut connection: Connection) -> Result<Answer, Failure> {
        let kept = if self.keep_alive { "keep-alive" } else { "close" };
        let request = Request::get(&self.url.path)
            .header("Host", &self.url.host)
            .header("User-Agent", "ferry")
            .header("Connection", kept)
            .body(Empty::new())
            .map_err(error)?;
        let response = connection.send_request(request).await.map_err(error)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(error)?.to_bytes();
        if !status.is_success() {
            return Err(error(format_args!("the server answered {status}")));
        }
        if self.same {
            self.compare(&body)?;
        }
        if self.keep_alive {
            self.idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(connection);
        }
        Ok(Answer {
            bytes: body.len() as u64,
        })
    }

    fn compare(&self, body: &[u8]) -> Result<(), Failure> {
        let mut hasher = DefaultHasher::new();
        hasher.write(body);
        let this = (body.len() as u64, hasher.finish());
        let mut first = self.first_body.lock().unwrap_or_else(PoisonError::into_inner);
        if *first.get_or_insert(this) == this {
            return Ok(());
        }
        Err(Failure::Wrong(format!(
            "an answer of {} bytes differs from the first one",
            body.len()
        )))
    }
}
