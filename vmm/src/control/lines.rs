//! A response body that grows: JSON lines as they come, until the sender is gone.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;

/// Lines that wait for a client that does not read; then the sender waits too.
const WAITING_LINES: usize = 64;

struct Lines(mpsc::Receiver<Bytes>);

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.get_mut()
            .0
            .poll_recv(cx)
            .map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

/// The sending end; dropping it ends the response.
pub(super) struct Sender(mpsc::Sender<Bytes>);

impl Sender {
    /// False: the client is gone.
    pub(super) async fn send(&self, value: &impl Serialize) -> bool {
        let Ok(mut line) = serde_json::to_vec(value) else {
            return true;
        };
        line.push(b'\n');
        self.0.send(line.into()).await.is_ok()
    }

    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}

pub(super) fn response() -> (Sender, Response) {
    let (sender, receiver) = mpsc::channel(WAITING_LINES);
    let body = Body::new(Lines(receiver));
    (
        Sender(sender),
        ([(CONTENT_TYPE, "application/jsonl")], body).into_response(),
    )
}
