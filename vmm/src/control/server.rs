//! Who may ask, and which request goes where.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::serve::IncomingStream;
use tokio::net::UnixListener;
use tokio::sync::broadcast;

use super::api::{self, Event, What};
use super::handlers::{self, ApiError};
use crate::crossing::depart::Crossings;
use crate::machine::Machine;
use crate::name::Name;

/// Events that wait for a client that does not read.
const WAITING_EVENTS: usize = 256;

/// What the handlers share.
pub struct Control {
    pub name: Name,
    pub machine: Arc<Machine>,
    pub crossings: Arc<Crossings>,
    pub since: Instant,
    pub events: broadcast::Sender<Event>,
}

impl Control {
    pub fn new(name: Name, machine: Arc<Machine>, crossings: Arc<Crossings>) -> Arc<Control> {
        Arc::new(Control {
            name,
            machine,
            crossings,
            since: Instant::now(),
            events: broadcast::Sender::new(WAITING_EVENTS),
        })
    }

    /// To everybody who reads /v1/events.
    pub fn tell(&self, what: What) {
        // An error only says that nobody listens.
        let _ = self.events.send(Event::now(what));
    }
}

/// The user at the other end of a connection.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        Peer {
            uid: stream.io().peer_cred().ok().map(|cred| cred.uid()),
        }
    }
}

/// The folder and the socket are closed to others already; this holds if somebody opens them up.
pub(crate) fn may_ask(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

async fn check_peer(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.uid.is_some_and(may_ask) {
        next.run(request).await
    } else {
        let sentence = "this machine belongs to another user; only that user and root may ask";
        ApiError(StatusCode::FORBIDDEN, sentence.to_owned()).into_response()
    }
}

async fn unknown(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(100).collect();
    ApiError(
        StatusCode::NOT_FOUND,
        format!("there is no {method} {path}; docs/control-api.md lists what there is"),
    )
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path = uri.path();
    ApiError(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{path} does not take {method}; see docs/control-api.md"),
    )
}

/// A body that says that it is too long is refused before it comes; one that turns out to be is answered by axum in
/// plain text, which becomes our sentence.
async fn limit_body(request: Request, next: Next) -> Response {
    let too_long = || {
        let sentence = format!("a request has at most {} bytes", api::BODY_LIMIT_BYTES);
        ApiError(StatusCode::PAYLOAD_TOO_LARGE, sentence).into_response()
    };
    if request.body().size_hint().lower() > api::BODY_LIMIT_BYTES as u64 {
        return too_long();
    }
    let response = next.run(request).await;
    match response.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_long(),
        _ => response,
    }
}

fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route(api::MACHINE, get(handlers::get_machine))
        .route(api::MACHINE_STATE, put(handlers::put_state))
        .route(api::PULSE, post(handlers::post_pulse))
        .route(
            api::BALLOON,
            get(handlers::get_balloon).put(handlers::put_balloon),
        )
        .route(api::EVENTS, get(handlers::get_events))
        .route(
            api::RESOLVE,
            get(handlers::get_resolve).post(handlers::post_resolve),
        )
        .route(api::REHEARSAL, post(handlers::post_rehearsal))
        .route(
            api::CROSSING,
            post(handlers::post_crossing).delete(handlers::delete_crossing),
        )
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(api::BODY_LIMIT_BYTES))
        .layer(middleware::from_fn(limit_body))
        .layer(middleware::from_fn(check_peer))
        .with_state(control)
}

/// Binds the socket, for this user only.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Control {
    /// Answers until `end`, then finishes what was begun.
    pub async fn serve(
        self: Arc<Self>,
        listener: UnixListener,
        end: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let service = router(self).into_make_service_with_connect_info::<Peer>();
        axum::serve(listener, service).with_graceful_shutdown(end).await
    }
}
