//! Asks a machine's control socket. Blocking: the commands that use it do one thing at a time.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::api::{
    self, BalloonInfo, BalloonTarget, Cancelled, DoubtInfo, ErrorBody, Event, MachineInfo, PulseReport,
    PulseRequest, Resolution, ResolveRequest, Want, WantState,
};
use crate::crossing::rehearse::Rehearsal;
use crate::crossing::request::{CrossingLine, CrossingRequest};
use crate::rundir::Entry;

/// An answer is never longer; a socket that says more is not ours.
const ANSWER_LIMIT_BYTES: usize = 16 << 20;
/// For everything that does not work for long.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The machine heard and said no; its sentence.
    #[error("{0}")]
    Refused(String),
    #[error("the machine's process does not answer on {}: {why}; `ferry kill` ends it", socket.display())]
    NoAnswer { socket: PathBuf, why: String },
}

pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

impl Client {
    pub fn new(socket: &Path) -> io::Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Client {
            socket: socket.to_owned(),
            runtime,
        })
    }

    pub fn of(entry: &Entry) -> io::Result<Client> {
        Client::new(&entry.control_socket())
    }

    pub fn info(&self) -> Result<MachineInfo, ClientError> {
        self.call(Method::GET, api::MACHINE, &(), Some(PATIENCE))
    }

    /// The same for a list, where one machine that hangs must not hide the others.
    pub fn info_within(&self, patience: Duration) -> Result<MachineInfo, ClientError> {
        self.call(Method::GET, api::MACHINE, &(), Some(patience))
    }

    pub fn want(&self, want: Want) -> Result<MachineInfo, ClientError> {
        self.want_within(want, PATIENCE)
    }

    pub fn want_within(&self, want: Want, patience: Duration) -> Result<MachineInfo, ClientError> {
        self.call(
            Method::PUT,
            api::MACHINE_STATE,
            &WantState { want },
            Some(patience),
        )
    }

    /// As long as it takes.
    pub fn pulse(&self, count: u32) -> Result<PulseReport, ClientError> {
        self.call(Method::POST, api::PULSE, &PulseRequest { count }, None)
    }

    pub fn balloon(&self) -> Result<BalloonInfo, ClientError> {
        self.call(Method::GET, api::BALLOON, &(), Some(PATIENCE))
    }

    pub fn set_balloon(&self, target: BalloonTarget) -> Result<BalloonInfo, ClientError> {
        self.call(Method::PUT, api::BALLOON, &target, Some(PATIENCE))
    }

    /// Gives every event to `each` until it breaks or the machine ends.
    pub fn events(&self, mut each: impl FnMut(Event) -> ControlFlow<()>) -> Result<(), ClientError> {
        self.lines(
            Method::GET,
            api::EVENTS,
            &(),
            |line| match serde_json::from_slice(line) {
                Ok(event) => each(event),
                // A newer monitor may tell things that this client does not know.
                Err(_) => ControlFlow::Continue(()),
            },
        )
    }

    /// Moves the machine and gives every line of the answer to `each`.
    pub fn cross(
        &self,
        request: &CrossingRequest,
        mut each: impl FnMut(CrossingLine),
    ) -> Result<(), ClientError> {
        self.lines(Method::POST, api::CROSSING, request, |line| {
            // A newer monitor may tell things that this client does not know.
            if let Ok(line) = serde_json::from_slice(line) {
                each(line);
            }
            ControlFlow::Continue(())
        })
    }

    /// What would become of that crossing. Takes some seconds; a link that stalls, as long as the request allows.
    pub fn rehearse(&self, request: &CrossingRequest) -> Result<Rehearsal, ClientError> {
        self.call(Method::POST, api::REHEARSAL, request, None)
    }

    pub fn cancel_crossing(&self) -> Result<Cancelled, ClientError> {
        self.call(Method::DELETE, api::CROSSING, &(), Some(PATIENCE))
    }

    pub fn doubt(&self) -> Result<DoubtInfo, ClientError> {
        self.call(Method::GET, api::RESOLVE, &(), Some(PATIENCE))
    }

    /// The other side is asked, which takes what it takes.
    pub fn resolve(&self, request: &ResolveRequest) -> Result<Resolution, ClientError> {
        self.call(Method::POST, api::RESOLVE, request, None)
    }

    /// One request with one JSON answer.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        patience: Option<Duration>,
    ) -> Result<T, ClientError> {
        let talk = async {
            let response = self.request(method, path, body).await?;
            let bytes = Limited::new(response.into_body(), ANSWER_LIMIT_BYTES)
                .collect()
                .await;
            let bytes = bytes.map_err(|e| self.no_answer(e))?.to_bytes();
            serde_json::from_slice(&bytes).map_err(|e| self.no_answer(e))
        };
        self.runtime.block_on(async {
            match patience {
                None => talk.await,
                Some(limit) => tokio::time::timeout(limit, talk)
                    .await
                    .unwrap_or_else(|_| Err(self.no_answer(format!("nothing within {limit:?}")))),
            }
        })
    }

    /// One request answered by JSON lines, until `each` breaks or the answer ends.
    pub fn lines(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let mut answer = self.request(method, path, body).await?.into_body();
            let mut waiting = Vec::new();
            while let Some(frame) = answer.frame().await {
                let frame = frame.map_err(|e| self.no_answer(e))?;
                waiting.extend(frame.data_ref().map(|d| d.as_ref()).unwrap_or_default());
                while let Some(end) = waiting.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = waiting.drain(..=end).collect();
                    if each(&line).is_break() {
                        return Ok(());
                    }
                }
                if waiting.len() > ANSWER_LIMIT_BYTES {
                    return Err(self.no_answer("a line without end"));
                }
            }
            Ok(())
        })
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| self.no_answer(e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.no_answer(e))?;
        tokio::spawn(connection);
        let body = if method == Method::GET {
            Vec::new()
        } else {
            serde_json::to_vec(body).unwrap_or_default()
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "ferry")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.no_answer(e))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| self.no_answer(e))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = Limited::new(response.into_body(), ANSWER_LIMIT_BYTES)
            .collect()
            .await;
        let text = text.map(|body| body.to_bytes()).unwrap_or_default();
        match serde_json::from_slice::<ErrorBody>(&text) {
            Ok(body) => Err(ClientError::Refused(body.error)),
            Err(_) => Err(ClientError::Refused(format!(
                "the machine answered with {status}"
            ))),
        }
    }

    fn no_answer(&self, why: impl ToString) -> ClientError {
        ClientError::NoAnswer {
            socket: self.socket.clone(),
            why: why.to_string(),
        }
    }
}
