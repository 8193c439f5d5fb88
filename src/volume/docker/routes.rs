//! The protocol's calls, and how each is answered.
//!
//! | call | answer |
//! |---|---|
//! | `Plugin.Activate` | what we are |
//! | `VolumeDriver.Capabilities` | volumes are of this host |
//! | `VolumeDriver.Create` | made, with its file system; one with equal options may be there already |
//! | `VolumeDriver.Remove` | removed, unless the kernel knows of somebody who uses it |
//! | `VolumeDriver.Mount`, `Unmount` | counted for each ID; the last one out unmounts |
//! | `VolumeDriver.Path`, `Get`, `List` | what there is |
//!
//! A failure is status 500 with `{"Err": "one line"}`, whatever kind it is of: podman takes any 200 for a success, and
//! would run its container on the host's root file system.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Extension, FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::server::Seat;
use super::wire::{Answer, Capabilities, Create, MEDIA_TYPE, Mount, Volume, Which};
use super::work::Work;
use crate::volume::{Error, Name, Options, Silent};

/// The longest body of a request. Names and options are short.
const BODY_BYTES: usize = 64 << 10;

/// Time for it to come.
const BODY_LIMIT: Duration = Duration::from_secs(5);

/// A look at a volume that takes longer has met a disk or server that hangs.
const LOOK_LIMIT: Duration = Duration::from_secs(20);

/// The routes, for one client.
pub(super) fn router(work: Arc<Work>, seat: Arc<Seat>) -> Router {
    Router::new()
        .route("/Plugin.Activate", post(activate))
        .route("/VolumeDriver.Capabilities", post(capabilities))
        .route("/VolumeDriver.Create", post(create))
        .route("/VolumeDriver.Remove", post(remove))
        .route("/VolumeDriver.Mount", post(mount))
        .route("/VolumeDriver.Unmount", post(unmount))
        .route("/VolumeDriver.Path", post(path))
        .route("/VolumeDriver.Get", post(get))
        .route("/VolumeDriver.List", post(list))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(Extension(seat))
        .with_state(work)
}

type Site = State<Arc<Work>>;
type Given = Result<Answer, Refusal>;

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, MEDIA_TYPE)], Json(self)).into_response()
    }
}

/// An answer that is no success.
struct Refusal(StatusCode, String);

impl Refusal {
    fn new(line: impl Into<String>) -> Self {
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, line.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        tracing::info!("refused: {}", self.1);
        (self.0, Answer { error: self.1, ..Answer::default() }).into_response()
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::new(error.to_string())
    }
}

/// The body of a request, as what it should be. When it is whole, its client has a claim to be heard out.
struct Call<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Call<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let seat = request.extensions().get::<Arc<Seat>>().cloned();
        let bytes = match tokio::time::timeout(BODY_LIMIT, Bytes::from_request(request, state)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Err(Refusal::new(error.body_text())),
            Err(_) => return Err(Refusal::new("the body does not come")),
        };
        if let Some(seat) = seat {
            seat.take();
        }
        let value = serde_json::from_slice(&bytes);
        value.map(Call).map_err(|error| Refusal::new(format!("the body is not what is wanted: {error}")))
    }
}

async fn activate() -> Answer {
    Answer { implements: Some(["VolumeDriver"]), ..Answer::default() }
}

async fn capabilities() -> Answer {
    Answer { capabilities: Some(Capabilities { scope: "local" }), ..Answer::default() }
}

async fn create(State(work): Site, Call(wish): Call<Create>) -> Given {
    let name: Name = wish.name.parse()?;
    let pairs: BTreeMap<String, String> = wish.options.unwrap_or_default();
    let options = Options::try_from(pairs)?;
    work.change(name, move |pool, name| pool.create(name, &options, &Silent).map(drop)).await?;
    Ok(Answer::default())
}

async fn remove(State(work): Site, Call(which): Call<Which>) -> Given {
    work.change(which.name.parse()?, |pool, name| pool.remove(name, false)).await?;
    Ok(Answer::default())
}

async fn mount(State(work): Site, Extension(seat): Extension<Arc<Seat>>, Call(wish): Call<Mount>) -> Given {
    let path = work.mount(wish.name.parse()?, wish.id, seat.client()).await?;
    Ok(Answer { mountpoint: Some(text(&path)), ..Answer::default() })
}

async fn unmount(State(work): Site, Call(wish): Call<Mount>) -> Given {
    work.change(wish.name.parse()?, move |pool, name| pool.unmount(name, &wish.id)).await?;
    Ok(Answer::default())
}

async fn path(State(work): Site, Call(which): Call<Which>) -> Given {
    let path = in_time(work.look(which.name.parse()?, |pool, name| pool.path(name))).await?;
    Ok(Answer { mountpoint: Some(path.map_or_else(String::new, |path| text(&path))), ..Answer::default() })
}

async fn get(State(work): Site, Call(which): Call<Which>) -> Given {
    let volume = work.look(which.name.parse()?, |pool, name| match pool.status(name) {
        Ok(status) => Ok(Volume::inspected(&status)),
        // It is there, and can be removed.
        Err(Error::Broken(why)) => Ok(Volume::broken(name, &why)),
        Err(error) => Err(error),
    });
    Ok(Answer { volume: Some(in_time(volume).await?), ..Answer::default() })
}

async fn list(State(work): Site, Extension(seat): Extension<Arc<Seat>>) -> Given {
    seat.take();
    let volumes = work.look_at_all(|pool| {
        let listed = pool.all()?.into_iter().map(|(name, record)| {
            let mounted = pool.path(&name).ok().flatten();
            let created = record.ok().map(|record| record.created);
            Volume::listed(&name, mounted.map_or_else(String::new, |path| text(&path)), created)
        });
        Ok(listed.collect())
    });
    Ok(Answer { volumes: Some(in_time(volumes).await?), ..Answer::default() })
}

async fn unknown(request: Request) -> Refusal {
    let line = format!("{} {}: not a call of the volume plugin protocol", request.method(), request.uri());
    Refusal(StatusCode::NOT_FOUND, line)
}

async fn in_time<T>(look: impl Future<Output = crate::volume::Result<T>>) -> Result<T, Refusal> {
    match tokio::time::timeout(LOOK_LIMIT, look).await {
        Ok(result) => result.map_err(Refusal::from),
        Err(_) => Err(Refusal::new("it does not answer; is its disk there?")),
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
