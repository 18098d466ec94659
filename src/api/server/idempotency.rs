//! `Idempotency-Key`: a request that comes again with the key of an earlier one is answered as that was, and not carried
//! out again.
//!
//! Before a request is carried out, a record without an answer is written; afterwards the answer, durably, and only then
//! is it sent. The store's log is in order, so what the request did is never durable without the first record: if the
//! daemon dies in between, the key's next use is told that the outcome is unknown, and nothing is done twice. A refusal
//! leaves no record, since nothing was done. Requests with one key wait for each other; one whose caller goes away is
//! carried out to its end all the same.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State as AppState};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use storage::Store;
use tracing::Instrument;

use super::answer::ApiError;
use super::request::{MAX_JSON, collect, flag_of};
use crate::api::types::ErrorBody;
use crate::engine::error::{Error, Kind};

/// How long an answer is kept.
const KEPT: SignedDuration = SignedDuration::from_hours(24);
/// How often what is older is looked for, at most.
const SWEEP: SignedDuration = SignedDuration::from_mins(10);
/// Most bytes of an answer that is kept.
const MAX_ANSWER: usize = 1 << 20;
/// Kind of the records; the key is a digest of the caller's.
const RECORD: &str = "idempotency";

/// Says that an answer is an earlier one.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// What is known of a key.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Of the request.
    digest: String,
    at: Timestamp,
    /// None yet, or not any more.
    answer: Option<KeptAnswer>,
    #[serde(default)]
    too_large: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptAnswer {
    status: u16,
    body: KeptBody,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KeptBody {
    Success(Value),
    Failure(Box<ErrorBody>),
}

/// The one request of a key that is being carried out.
struct Turn {
    keeper: Arc<Keeper>,
    name: String,
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.keeper.turns.lock();
        self.held = None;
        // The map's alone: nobody waits.
        if turns.get(&self.name).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            turns.remove(&self.name);
        }
    }
}

/// Tells the time of day.
type Clock = Box<dyn Fn() -> Timestamp + Send + Sync>;

/// The answers of the last day.
pub(super) struct Keeper {
    store: Store,
    clock: Clock,
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    swept: Mutex<Timestamp>,
}

/// Answers a request that has a key, or passes it on.
pub(super) async fn once(AppState(keeper): AppState<Arc<Keeper>>, request: Request, next: Next) -> Response {
    let keyed = request.method() == Method::POST && !is_harmless(request.uri().path());
    match request.headers().get("idempotency-key").cloned() {
        Some(key) if keyed => keeper.answer(&key, request, next).await.unwrap_or_else(IntoResponse::into_response),
        _ => next.run(request).await,
    }
}

/// Whether a `POST` to this path is answered with a document that can be kept.
pub(super) fn takes_key(path: &str) -> bool {
    !is_harmless(path) && !path.ends_with("/stream") && !path.ends_with("/stdin") && !path.ends_with("/disk-imports")
}

/// Whether doing it twice is the same as doing it once.
fn is_harmless(path: &str) -> bool {
    path.contains("/fs/") || path.starts_with("/api/v1/store/") || path.ends_with("/publish")
}

impl Keeper {
    pub(super) fn new(store: Store) -> Self {
        Self::with_clock(store, Box::new(Timestamp::now))
    }

    fn with_clock(store: Store, clock: Clock) -> Self {
        Self { store, clock, turns: Mutex::default(), swept: Mutex::new(Timestamp::UNIX_EPOCH) }
    }

    async fn answer(self: &Arc<Self>, key: &HeaderValue, request: Request, next: Next) -> Result<Response, ApiError> {
        let key = key.as_bytes();
        if key.is_empty() || key.len() > 255 {
            return Err(Error::new(Kind::InvalidInput, "an Idempotency-Key has 1 to 255 characters").into());
        }
        if !takes_key(request.uri().path()) || flag_of(request.uri().query(), "stream") {
            let message = "what is answered or sent as a stream cannot be kept under an Idempotency-Key";
            return Err(Error::new(Kind::UnsupportedOption, message).hint("leave the header out").into());
        }
        let name = blake3::hash(key).to_hex().to_string();
        let (parts, body) = request.into_parts();
        let body = collect(body, MAX_JSON).await?;
        let target = parts.uri.path_and_query().map_or("", |p| p.as_str());
        let digest = blake3::Hasher::new().update(target.as_bytes()).update(b"\0").update(&body).finalize();
        let digest = digest.to_hex().to_string();

        let turn = self.turn(&name).await;
        self.sweep();
        if let Some(kept) = self.find(&name)? {
            return kept.again(&digest);
        }
        self.put(&name, Kept { digest: digest.clone(), at: (self.clock)(), answer: None, too_large: false }, false)
            .await?;
        let keeper = self.clone();
        let request = Request::from_parts(parts, Body::from(body));
        let work = async move {
            let response = next.run(request).await;
            let response = keeper.keep(&name, digest, response).await;
            drop(turn);
            response
        };
        tokio::spawn(work.in_current_span())
            .await
            .unwrap_or_else(|e| Err(Error::internal(format!("a request did not end: {e}")).into()))
    }

    /// Waits for those before with the same key.
    async fn turn(self: &Arc<Self>, name: &str) -> Turn {
        let lock = self.turns.lock().entry(name.to_owned()).or_default().clone();
        Turn { keeper: self.clone(), name: name.to_owned(), held: Some(lock.lock_owned().await) }
    }

    fn find(&self, name: &str) -> Result<Option<Kept>, ApiError> {
        let Some(bytes) = self.store.record(RECORD, name) else { return Ok(None) };
        let kept: Kept = serde_json::from_slice(&bytes)
            .map_err(|e| Error::internal(format!("the record of an idempotency key cannot be read: {e}")))?;
        Ok((!kept.is_old((self.clock)())).then_some(kept))
    }

    async fn put(&self, name: &str, kept: Kept, durable: bool) -> Result<(), ApiError> {
        let bytes =
            serde_json::to_vec(&kept).map_err(|e| Error::internal(format!("an answer could not be kept: {e}")))?;
        self.change(name.to_owned(), Some(bytes), durable).await
    }

    async fn change(&self, name: String, bytes: Option<Vec<u8>>, durable: bool) -> Result<(), ApiError> {
        let store = self.store.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut transaction = store.begin();
            match bytes {
                Some(bytes) => transaction.put_record(RECORD, &name, bytes),
                None => transaction.delete_record(RECORD, &name),
            }
            let commit = transaction.commit()?;
            if durable { commit.wait() } else { Ok(()) }
        });
        let written = written.await.map_err(|e| Error::internal(format!("a call of the store did not end: {e}")))?;
        Ok(written.map_err(Error::from)?)
    }

    /// Keeps an answer before it is sent; of a refusal, that there was none.
    async fn keep(&self, name: &str, digest: String, response: Response) -> Result<Response, ApiError> {
        let status = response.status();
        if let Some(error) = response.extensions().get::<Arc<ErrorBody>>().cloned() {
            // A failure that names what it made all the same would make it again.
            if error.details.is_none() {
                self.change(name.to_owned(), None, false).await?;
                return Ok(response);
            }
            let answer = KeptAnswer { status: status.as_u16(), body: KeptBody::Failure(Box::new((*error).clone())) };
            let kept = Kept { digest, at: (self.clock)(), answer: Some(answer), too_large: false };
            self.put(name, kept, true).await?;
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX)
            .await
            .map_err(|e| Error::internal(format!("an answer broke off: {e}")))?;
        let content = (body.len() <= MAX_ANSWER).then(|| serde_json::from_slice::<Value>(&body).ok()).flatten();
        let too_large = content.is_none();
        let answer = content.map(|value| KeptAnswer { status: status.as_u16(), body: KeptBody::Success(value) });
        self.put(name, Kept { digest, at: (self.clock)(), answer, too_large }, true).await?;
        Ok(Response::from_parts(parts, Body::from(body)))
    }

    /// Forgets what is older than a day, now and then.
    fn sweep(self: &Arc<Self>) {
        let now = (self.clock)();
        {
            let mut swept = self.swept.lock();
            if now.duration_since(*swept) < SWEEP {
                return;
            }
            *swept = now;
        }
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            let mut transaction = store.begin();
            for (name, bytes) in store.records(RECORD) {
                if serde_json::from_slice::<Kept>(&bytes).map_or(true, |kept| kept.is_old(now)) {
                    transaction.delete_record(RECORD, &name);
                }
            }
            // Durable with whatever is next; what comes back after a crash is swept then.
            if let Err(error) = transaction.commit().map(drop) {
                tracing::warn!(%error, "old idempotency keys could not be forgotten");
            }
        });
    }
}

impl Kept {
    fn is_old(&self, now: Timestamp) -> bool {
        now.duration_since(self.at) > KEPT
    }

    /// The answer to the same request.
    fn again(self, digest: &str) -> Result<Response, ApiError> {
        if self.digest != digest {
            let message = "this Idempotency-Key was used with another request within the last 24 hours";
            return Err(ApiError::new(422, "idempotency_key_reused", message).hint("use a new key for a new request"));
        }
        let Some(answer) = self.answer else {
            let message = match self.too_large {
                true => "the request of this Idempotency-Key was carried out; its answer was too large to be kept",
                false => "the daemon ended while the request of this Idempotency-Key was carried out",
            };
            return Err(ApiError::new(409, "idempotency_outcome_unknown", message)
                .hint("see whether what it asked for is there, and if not, ask again with a new key"));
        };
        let mut response = match answer.body {
            KeptBody::Success(value) => {
                let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
                let json = HeaderValue::from_static("application/json");
                (status, [(header::CONTENT_TYPE, json)], Bytes::from(value.to_string())).into_response()
            }
            KeptBody::Failure(body) => ApiError::of(answer.status, *body).into_response(),
        };
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use axum::Router;
    use axum::middleware::from_fn_with_state;
    use http_body_util::BodyExt;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use storage::Options;

    use super::*;

    #[tokio::test]
    async fn an_answer_is_kept_for_a_day_and_then_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        let now = Arc::new(Mutex::new(Timestamp::now()));
        let clock = now.clone();
        let keeper = Arc::new(Keeper::with_clock(store.clone(), Box::new(move || *clock.lock())));
        let done = Arc::new(AtomicU32::new(0));
        let carry_out = move || std::future::ready(axum::Json(done.fetch_add(1, Ordering::SeqCst) + 1));
        let routes = Router::new().fallback(carry_out).layer(from_fn_with_state(keeper, once));
        let service = TowerToHyperService::new(routes);
        let ask = async |key: &str| {
            let request =
                Request::post("/api/v1/things").header("idempotency-key", key).body(Body::from("{}")).unwrap();
            let answer = service.call(request).await.unwrap();
            let again = answer.headers().contains_key(REPLAYED);
            (answer.into_body().collect().await.unwrap().to_bytes().to_vec(), again)
        };
        let later = |by: SignedDuration| *now.lock() += by;
        assert_eq!(ask("a").await, (b"1".to_vec(), false));
        assert_eq!(ask("a").await, (b"1".to_vec(), true));
        later(SignedDuration::from_hours(24) - SignedDuration::from_secs(1));
        assert_eq!(ask("a").await, (b"1".to_vec(), true));
        later(SignedDuration::from_secs(2));
        assert_eq!(ask("a").await, (b"2".to_vec(), false));
        // What nobody asks for again goes when somebody asks for something else.
        later(SignedDuration::from_hours(25));
        assert_eq!(ask("b").await, (b"3".to_vec(), false));
        let began = std::time::Instant::now();
        while store.records(RECORD).len() > 1 {
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "old keys are not forgotten");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        // A clock that is set back makes none old.
        later(-SignedDuration::from_hours(100));
        assert_eq!(ask("b").await, (b"3".to_vec(), true));
    }
}
