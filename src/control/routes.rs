//! What can be asked and changed over the control socket, version 1.
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/instance` | the process, its exports, doors and clients |
//! | `GET /v1/stats[?export=NAME]` | counters of one export or of all |
//! | `GET /v1/throttle?export=NAME` | the limits that are set, its own and those of its groups |
//! | `PATCH /v1/throttle?export=NAME` | body `{"iops-total": 100, "bps-read": "50M"}`: these limits change, 0 takes one away |
//! | `DELETE /v1/throttle?export=NAME` | no limit of its own any more |
//! | `PATCH`, `DELETE /v1/throttle?export=NAME&group=GROUP` | the same for the limits that it shares with a group |
//! | `POST /v1/resize?export=NAME` | body `{"size": BYTES}`: the export grows |
//!
//! `export` may be left out where there is one. A failure is `{"error": "one line"}`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bridge::layer::{SettingError, ThrottleConfig, ThrottleHandle};
use bridge::{Error, ErrorKind, Export};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Site;
use super::guests::Progress;
use super::wire::{
    DoorInfo, ExportInfo, ExportStats, Failure, Instance, Limits, ResizeWish, Resized, Throttle,
};
use crate::os_text::OsText;

/// The longest body of a request.
const BODY_BYTES: usize = 16 << 10;

/// Time for it to come.
const BODY_LIMIT: Duration = Duration::from_secs(2);

/// The routes of this process.
pub(super) fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/v1/instance", get(instance))
        .route("/v1/stats", get(stats))
        .route("/v1/throttle", get(limits).patch(change_limits).delete(drop_limits))
        .route("/v1/resize", post(resize))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(site)
}

type Answer<T> = Result<Json<T>, Refusal>;

/// An answer that is not a success.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}

impl From<QueryRejection> for Refusal {
    fn from(error: QueryRejection) -> Self {
        Refusal(StatusCode::BAD_REQUEST, error.body_text())
    }
}

impl From<SettingError> for Refusal {
    fn from(error: SettingError) -> Self {
        Refusal(StatusCode::BAD_REQUEST, error.to_string())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidInput => StatusCode::BAD_REQUEST,
            ErrorKind::ReadOnly | ErrorKind::NotSupported => StatusCode::CONFLICT,
            ErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

/// A request's body, which must come soon.
struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let progress = request.extensions().get::<Progress>().cloned();
        match tokio::time::timeout(BODY_LIMIT, Bytes::from_request(request, state)).await {
            Ok(Ok(body)) => {
                progress.inspect(Progress::begin);
                Ok(Body(body))
            }
            Ok(Err(error)) => Err(Refusal(error.status(), error.body_text())),
            Err(_) => Err(Refusal(StatusCode::REQUEST_TIMEOUT, "the body does not come".to_owned())),
        }
    }
}

/// Which export is meant.
#[derive(Deserialize)]
struct Which {
    export: Option<String>,
    /// Of its limits, those of this group.
    group: Option<String>,
}

type WhichExport = Result<Query<Which>, QueryRejection>;

fn group_of(which: &WhichExport) -> Option<String> {
    which.as_ref().ok().and_then(|Query(which)| which.group.clone())
}

impl Site {
    fn find(&self, which: WhichExport) -> Result<&Arc<Export>, Refusal> {
        let Query(Which { export: name, .. }) = which?;
        let mut exports = self.exports.iter().map(|(export, _)| export);
        let found = match (&name, &*self.exports) {
            (None, [(only, _)]) => Some(only),
            (None, _) => {
                let message = "there are many exports; say which, as in ?export=NAME".to_owned();
                return Err(Refusal(StatusCode::BAD_REQUEST, message));
            }
            (Some(name), _) => exports.find(|export| export.name() == name),
        };
        found.ok_or_else(|| {
            let names: Vec<_> =
                self.exports.iter().map(|(export, _)| format!("`{}`", export.name())).collect();
            let message =
                format!("no export `{}` here; there is {}", name.unwrap_or_default(), names.join(", "));
            Refusal(StatusCode::NOT_FOUND, message)
        })
    }
}

async fn instance(State(site): State<Arc<Site>>) -> Json<Instance> {
    let mut doors = Vec::new();
    for door in &site.doors {
        let report = match &door.clients {
            Some(clients) => clients.list().await,
            None => Default::default(),
        };
        doors.push(DoorInfo { kind: door.kind.to_owned(), places: door.places.clone(), report });
    }
    let exports = site.exports.iter().map(|(export, source)| describe(export, source)).collect();
    Json(Instance {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started: site.started,
        exports,
        doors,
    })
}

fn describe(export: &Export, source: &OsText) -> ExportInfo {
    let geometry = export.geometry();
    ExportInfo {
        name: export.name().to_owned(),
        description: export.description().map(str::to_owned),
        source: source.clone(),
        size: geometry.size,
        read_only: geometry.read_only(),
        loss_after_crash: export.loss_after_crash(),
        limits: export.throttle().map(limits_of).unwrap_or_default(),
        groups: groups_of(export),
    }
}

async fn stats(State(site): State<Arc<Site>>, which: WhichExport) -> Answer<Vec<ExportStats>> {
    if matches!(&which, Ok(Query(Which { export: None, .. }))) {
        return Ok(Json(site.exports.iter().map(|(export, _)| ExportStats::of(export)).collect()));
    }
    Ok(Json(vec![ExportStats::of(site.find(which)?)]))
}

fn limits_of(throttle: &ThrottleHandle) -> Limits {
    throttle.config().settings().into_iter().collect()
}

fn groups_of(export: &Export) -> BTreeMap<String, Limits> {
    export.throttle_groups().iter().map(|(name, shared)| (name.clone(), limits_of(shared))).collect()
}

/// The export's own limits, or those of one of its groups.
fn throttle_of<'a>(export: &'a Export, group: Option<&str>) -> Result<&'a ThrottleHandle, Refusal> {
    let Some(group) = group else {
        return export.throttle().ok_or_else(|| {
            let message = "this export was made without limits, and takes none".to_owned();
            Refusal(StatusCode::CONFLICT, message)
        });
    };
    let groups = export.throttle_groups();
    let found = groups.iter().find(|(name, _)| name == group).map(|(_, shared)| shared);
    found.ok_or_else(|| {
        let names: Vec<_> = groups.iter().map(|(name, _)| format!("`{name}`")).collect();
        let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let message = format!("the export is in no group `{group}`; its groups: {names}");
        Refusal(StatusCode::NOT_FOUND, message)
    })
}

fn tell_limits(export: &Export) -> Result<Json<Throttle>, Refusal> {
    let limits = limits_of(throttle_of(export, None)?);
    Ok(Json(Throttle { export: export.name().to_owned(), limits, groups: groups_of(export) }))
}

async fn limits(State(site): State<Arc<Site>>, which: WhichExport) -> Answer<Throttle> {
    tell_limits(site.find(which)?)
}

async fn change_limits(
    State(site): State<Arc<Site>>,
    which: WhichExport,
    Body(body): Body,
) -> Answer<Throttle> {
    let group = group_of(&which);
    let export = site.find(which)?;
    let throttle = throttle_of(export, group.as_deref())?;
    let changes: BTreeMap<String, serde_json::Value> = read_json(&body)?;
    let mut config = throttle.config();
    let text = changes.iter().map(|(key, value)| setting(key, value)).collect::<Result<Vec<_>, _>>()?;
    config = config.changed(&text.join(","))?;
    throttle.set(config)?;
    tracing::info!(export = export.name(), group, limits = %config, "limits changed");
    tell_limits(export)
}

/// One `key=value` in the throttle's own form; a value is a number, or a text with a unit.
fn setting(key: &str, value: &serde_json::Value) -> Result<String, Refusal> {
    let value = match value {
        serde_json::Value::Number(number) => number.to_string(),
        serde_json::Value::String(text) if !text.contains(',') => text.clone(),
        _ => {
            let message = format!("{key}: a number is needed, or a text as in \"50M\"");
            return Err(Refusal(StatusCode::BAD_REQUEST, message));
        }
    };
    if key.contains([',', '=']) {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("`{key}` is no throttle key")));
    }
    Ok(format!("{key}={value}"))
}

async fn drop_limits(State(site): State<Arc<Site>>, which: WhichExport) -> Answer<Throttle> {
    let group = group_of(&which);
    let export = site.find(which)?;
    throttle_of(export, group.as_deref())?.set(ThrottleConfig::default())?;
    tracing::info!(export = export.name(), group, "limits dropped");
    tell_limits(export)
}

async fn resize(State(site): State<Arc<Site>>, which: WhichExport, Body(body): Body) -> Answer<Resized> {
    let export = site.find(which)?;
    let ResizeWish { size } = read_json(&body)?;
    let (old_size, there) = (export.geometry().size, export.clone());
    // A task of the worker's: should the client leave meanwhile, it still comes to its end.
    let resized =
        site.workers.run(site.workers.next(), move || async move { there.resize(size).await }).await;
    let ended = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the server is ending".to_owned());
    resized.ok_or_else(ended)??;
    let size = export.geometry().size;
    let fixed = site.doors.iter().filter(|_| size > old_size).filter_map(|door| door.fixed.clone());
    Ok(Json(Resized { export: export.name().to_owned(), old_size, size, fixed: fixed.collect() }))
}

fn read_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| {
        Refusal(StatusCode::BAD_REQUEST, format!("the body is not what is expected: {error}"))
    })
}

async fn unknown_route() -> Refusal {
    let message = "there is /v1/instance, /v1/stats, /v1/throttle and /v1/resize".to_owned();
    Refusal(StatusCode::NOT_FOUND, message)
}

async fn wrong_method() -> Refusal {
    let message = "GET reads; PATCH and DELETE change /v1/throttle, POST /v1/resize".to_owned();
    Refusal(StatusCode::METHOD_NOT_ALLOWED, message)
}
