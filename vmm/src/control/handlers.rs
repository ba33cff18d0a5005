//! What each request does. Verbs of a machine block, so they run on blocking threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use tokio::sync::broadcast::error::RecvError;

use super::api::{
    BalloonInfo, BalloonTarget, Cancelled, DoubtInfo, ErrorBody, Event, MAX_PULSES, MachineInfo, PulseReport,
    PulseRequest, Resolution, ResolveRequest, Want, WantState, What,
};
use super::lines;
use super::server::Control;
use crate::crossing::rehearse::Rehearsal;
use crate::crossing::request::CrossingRequest;
use crate::crossing::settle::{Place, Settled};
use crate::error::MachineError;
use crate::lifecycle::{State, StopReason};

/// A refusal: a status and one sentence.
#[derive(Debug)]
pub(super) struct ApiError(pub StatusCode, pub String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

impl From<MachineError> for ApiError {
    fn from(error: MachineError) -> ApiError {
        let status = match &error {
            MachineError::Config(_) => StatusCode::BAD_REQUEST,
            MachineError::State(_) => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError(status, error.to_string())
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

/// curl says that a body is a form unless told otherwise, so the content type is not asked about.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    // serde would take a list for an object and hope that the order is right.
    if !body.trim_ascii_start().starts_with(b"{") {
        let sentence = "the request is not understood: its body is a JSON object";
        return Err(ApiError(StatusCode::BAD_REQUEST, sentence.to_owned()));
    }
    serde_json::from_slice(body).map_err(|error| {
        ApiError(
            StatusCode::BAD_REQUEST,
            format!("the request is not understood: {error}"),
        )
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(ApiError(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the request broke: {error}"),
        ))
    })
}

fn info(control: &Control) -> MachineInfo {
    MachineInfo {
        name: control.name.clone(),
        pid: std::process::id(),
        ferry: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: control.since.elapsed().as_secs_f64(),
        machine: control.machine.info(),
    }
}

pub(super) async fn get_machine(Shared(control): Shared<Arc<Control>>) -> Answer<MachineInfo> {
    blocking(move || Ok(Json(info(&control)))).await
}

pub(super) async fn put_state(Shared(control): Shared<Arc<Control>>, body: Bytes) -> Answer<MachineInfo> {
    let WantState { want } = parse(&body)?;
    blocking(move || {
        let machine = &control.machine;
        match (want, machine.state()) {
            (Want::Paused, State::Paused) if machine.is_held() => {
                let sentence = "the machine stands still for its crossing and runs on by itself; ask again when it is over";
                return Err(ApiError(StatusCode::CONFLICT, sentence.to_owned()));
            }
            // Asking twice is not a mistake.
            (Want::Paused, State::Paused) | (Want::Running, State::Running) => {}
            (Want::Paused, _) => {
                machine.pause()?;
            }
            (Want::Running, _) => {
                control.crossings.may_run()?;
                machine.resume()?;
            }
            (Want::Stopped, State::Paused) => {
                let sentence =
                    "the machine is paused and cannot hear its power button; resume it first, or kill it";
                return Err(ApiError(StatusCode::CONFLICT, sentence.to_owned()));
            }
            (Want::Stopped, _) => machine.power_button()?,
            (Want::Killed, _) => {
                control.crossings.end();
                machine.stop(StopReason::Requested)?;
            }
        }
        Ok(Json(info(&control)))
    })
    .await
}

/// Set when the client has gone away, so that nobody pulses a machine for no one.
struct Abandoned(Arc<AtomicBool>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub(super) async fn post_pulse(Shared(control): Shared<Arc<Control>>, body: Bytes) -> Answer<PulseReport> {
    let PulseRequest { count } = if body.is_empty() {
        PulseRequest::default()
    } else {
        parse(&body)?
    };
    if count == 0 || count > MAX_PULSES {
        let sentence = format!("count is between 1 and {MAX_PULSES}, {count} was asked for");
        return Err(ApiError(StatusCode::BAD_REQUEST, sentence));
    }
    let abandoned = Abandoned(Arc::default());
    let is_abandoned = abandoned.0.clone();
    let report = blocking(move || {
        control.crossings.may_run()?;
        let mut stood_still = Vec::new();
        while stood_still.len() < count as usize && !is_abandoned.load(Ordering::Relaxed) {
            stood_still.push(control.machine.pulse()?);
        }
        let none = || ApiError(StatusCode::INTERNAL_SERVER_ERROR, "no pulse was made".to_owned());
        let report = PulseReport::of(stood_still).ok_or_else(none)?;
        control.tell(What::Pulses(report));
        Ok(report)
    })
    .await?;
    drop(abandoned);
    Ok(Json(report))
}

/// A guest answers within its next few interrupts, or not at all.
const PATIENCE_FOR_STATS: Duration = Duration::from_millis(300);

fn balloon(control: &Control, target: Option<BalloonTarget>) -> Answer<BalloonInfo> {
    let refuse = |status, sentence: String| ApiError(status, sentence);
    let balloon = control.machine.balloon().ok_or_else(|| {
        let sentence = "the machine has no balloon; `ferry run --balloon` gives it one".to_owned();
        refuse(StatusCode::CONFLICT, sentence)
    })?;
    if let Some(BalloonTarget { target_bytes }) = target {
        let memory = control.machine.config().memory;
        if target_bytes > memory.0 {
            let sentence = format!("the machine has {memory} of memory and cannot give {target_bytes} bytes");
            return Err(refuse(StatusCode::BAD_REQUEST, sentence));
        }
        balloon.set_target_bytes(target_bytes);
    }
    let guest = balloon.fresh_stats(PATIENCE_FOR_STATS);
    Ok(Json(BalloonInfo {
        target_bytes: balloon.target_bytes(),
        actual_bytes: balloon.actual_bytes(),
        guest,
    }))
}

pub(super) async fn get_balloon(Shared(control): Shared<Arc<Control>>) -> Answer<BalloonInfo> {
    blocking(move || balloon(&control, None)).await
}

pub(super) async fn put_balloon(Shared(control): Shared<Arc<Control>>, body: Bytes) -> Answer<BalloonInfo> {
    let target = parse(&body)?;
    blocking(move || balloon(&control, Some(target))).await
}

/// The state as it is, then everything that happens, until the machine's end.
pub(super) async fn get_events(Shared(control): Shared<Arc<Control>>) -> Response {
    let (sender, response) = lines::response();
    tokio::spawn(async move {
        let mut states = control.machine.watch();
        let mut others = control.events.subscribe();
        loop {
            let state = states.borrow_and_update().clone();
            let last = state.is_final();
            if !sender.send(&Event::now(What::State(state))).await || last {
                return;
            }
            loop {
                tokio::select! {
                    changed = states.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    other = others.recv() => match other {
                        Ok(event) => if !sender.send(&event).await { return },
                        // A client that does not read loses the oldest.
                        Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => return,
                    },
                    () = sender.closed() => return,
                }
            }
        }
    });
    response
}

/// Moves the machine; everything that happens comes as lines, the report last. A client that goes away cancels.
pub(super) async fn post_crossing(
    Shared(control): Shared<Arc<Control>>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let request: CrossingRequest = parse(&body)?;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let handle = blocking({
        let control = control.clone();
        move || {
            let tell = move |line| drop(tell.send(line));
            Ok(control
                .crossings
                .begin(&control.machine, &control.name, request, tell)?)
        }
    })
    .await?;
    let (sender, response) = lines::response();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                line = told.recv() => match line {
                    Some(line) => if !sender.send(&line).await { handle.cancel() },
                    None => return,
                },
                () = sender.closed() => {
                    handle.cancel();
                    return;
                }
            }
        }
    });
    Ok(response)
}

/// What would become of a crossing. A client that goes away ends it.
pub(super) async fn post_rehearsal(Shared(control): Shared<Arc<Control>>, body: Bytes) -> Answer<Rehearsal> {
    let request: CrossingRequest = parse(&body)?;
    let asked = CancelWhenDropped(control.clone(), true);
    let rehearsal = blocking(move || {
        Ok(control
            .crossings
            .rehearse(&control.machine, &control.name, &request)?)
    })
    .await;
    asked.over();
    rehearsal.map(Json)
}

/// The client of a rehearsal: when it goes away before the answer, so does the rehearsal.
struct CancelWhenDropped(Arc<Control>, bool);

impl CancelWhenDropped {
    fn over(mut self) {
        self.1 = false;
    }
}

impl Drop for CancelWhenDropped {
    fn drop(&mut self) {
        if self.1 {
            self.0.crossings.cancel();
        }
    }
}

pub(super) async fn delete_crossing(Shared(control): Shared<Arc<Control>>) -> Json<Cancelled> {
    Json(Cancelled {
        cancelled: control.crossings.cancel(),
    })
}

pub(super) async fn get_resolve(Shared(control): Shared<Arc<Control>>) -> Json<DoubtInfo> {
    let doubt = control.crossings.doubt();
    Json(DoubtInfo {
        in_doubt: doubt.is_some(),
        session: doubt.as_ref().map(|doubt| doubt.session.to_string()),
        destination: doubt.map(|doubt| doubt.place.destination),
    })
}

pub(super) async fn post_resolve(Shared(control): Shared<Arc<Control>>, body: Bytes) -> Answer<Resolution> {
    let ResolveRequest { here, ask, tls } = parse(&body)?;
    blocking(move || {
        let remembered = control.crossings.doubt().map(|doubt| doubt.place);
        let place = remembered.map(|place| Place {
            destination: ask.unwrap_or(place.destination),
            tls: tls.or(place.tls),
            stall: place.stall,
        });
        let Some(Settled {
            whereabouts,
            evidence,
        }) = control.crossings.resolve(&control.machine, place, here)?
        else {
            let sentence = "there is nothing to settle: it is known where the machine is";
            return Err(ApiError(StatusCode::CONFLICT, sentence.to_owned()));
        };
        Ok(Json(Resolution {
            whereabouts,
            evidence,
            machine: info(&control),
        }))
    })
    .await
}
