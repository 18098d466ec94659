//! Bodies of requests that were answered before they were read.
//!
//! Who sends a file to a sandbox that does not exist is refused at its first bytes and is still sending. Closing the connection
//! then takes the answer from it: its next write fails, and over TCP what it has not yet read is lost (RFC 9112 §9.6). So
//! what is left of such a body is read and thrown away, for a time.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::Request;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::EXPECT;

use http_body_util::BodyExt;

/// For how long a body is read that nobody wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request's body; what is left of it when it is dropped is read.
pub(super) struct ReadToItsEnd {
    /// Until it is dropped.
    body: Option<Incoming>,
    /// Whether its sender waits to be told to send it, and need not be.
    waits: bool,
}

/// The request, with its body read in any case.
pub(super) fn read_to_its_end(request: Request<Incoming>) -> Request<ReadToItsEnd> {
    let waits = request.headers().contains_key(EXPECT);
    request.map(|body| ReadToItsEnd { body: Some(body), waits })
}

impl Body for ReadToItsEnd {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
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

impl Drop for ReadToItsEnd {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !self.waits && !body.is_end_stream()) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(tokio::time::timeout(PATIENCE, async move { while let Some(Ok(_)) = body.frame().await {} }));
    }
}
