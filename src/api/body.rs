//! Bodies of requests: handed over to where reading them may block, and read to their end although they were refused.
//!
//! Who sends a file to a sandbox that does not exist is refused at its first bytes and is still sending. Closing the connection
//! then takes the answer from it: its next write fails, and over TCP what it has not yet read is lost (RFC 9112 §9.6). So
//! what is left of such a body is read and thrown away, for a time.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::BodyDataStream;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::EXPECT;
use tokio::sync::mpsc;

use super::server::ApiError;

/// For how long a body is read that nobody wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// A body that a server is sent.
pub(crate) trait Incoming: Body<Data = Bytes> + Send + Unpin + 'static {}
impl<B: Body<Data = Bytes> + Send + Unpin + 'static> Incoming for B {}

/// A request's body; what is left of it when it is dropped is read.
pub(crate) struct ReadToItsEnd<B: Incoming> {
    /// Until it is dropped.
    body: Option<B>,
    /// Whether its sender waits to be told to send it, and need not be.
    waits: bool,
}

/// The request, with its body read in any case.
pub(crate) fn read_to_its_end<B: Incoming>(request: Request<B>) -> Request<ReadToItsEnd<B>> {
    let waits = request.headers().contains_key(EXPECT);
    request.map(|body| ReadToItsEnd { body: Some(body), waits })
}

impl<B: Incoming> Body for ReadToItsEnd<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        // From now on it sends.
        self.waits = false;
        self.body.as_mut().map_or(Poll::Ready(None), |body| Pin::new(body).poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl<B: Incoming> Drop for ReadToItsEnd<B> {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !self.waits && !body.is_end_stream()) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(tokio::time::timeout(PATIENCE, async move { while let Some(Ok(_)) = body.frame().await {} }));
    }
}

/// The next bytes of a body; none at its end.
pub(super) async fn next_piece(content: &mut BodyDataStream) -> Result<Option<Bytes>, ApiError> {
    let broken = |e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}"));
    content.next().await.transpose().map_err(broken)
}

/// Gives away a body piece by piece. The last is none; without it the body broke off, or nobody wants more of it.
pub(super) async fn hand_over(
    request: axum::extract::Request,
    to: mpsc::Sender<Option<Bytes>>,
) -> Result<(), ApiError> {
    let mut content = request.into_body().into_data_stream();
    loop {
        let piece = next_piece(&mut content).await?;
        let last = piece.is_none();
        if to.send(piece).await.is_err() || last {
            return Ok(());
        }
    }
}
