//! A connection to a port of the guest, as a stream of bytes.

use std::future::Future;
use std::io::{Error as IoError, ErrorKind as Io, Result as IoResult};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use miosa_agent::wire::MAX_PAYLOAD;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::{Event, Input, Stream};
use crate::{Error, Result};

type Sending = Pin<Box<dyn Future<Output = (Input, Result<()>)> + Send + Sync>>;

/// A connection to a port of the guest. Each direction is closed on its own; one that the guest or its session breaks
/// off is an error and never an end. Dropping it ends both directions.
pub struct PortStream {
    stream: Stream,
    /// What came and was not read yet.
    rest: Bytes,
    read_over: bool,
    /// Who writes: idle, or with up to 64 KiB on their way.
    input: Option<Input>,
    sending: Option<Sending>,
}

impl std::fmt::Debug for PortStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortStream").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl PortStream {
    pub(super) fn new(stream: Stream) -> PortStream {
        let input = Some(stream.input());
        PortStream { stream, rest: Bytes::new(), read_over: false, input, sending: None }
    }

    /// Waits until nothing is on its way.
    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<IoResult<()>> {
        let Some(sending) = &mut self.sending else { return Poll::Ready(Ok(())) };
        let (input, sent) = ready!(sending.as_mut().poll(context));
        (self.sending, self.input) = (None, Some(input));
        Poll::Ready(sent.map_err(|e| IoError::new(Io::BrokenPipe, e)))
    }
}

impl AsyncRead for PortStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<IoResult<()>> {
        let this = &mut *self;
        while this.rest.is_empty() && !this.read_over {
            match ready!(this.stream.poll_next(context)) {
                Ok(Event::Data(bytes) | Event::ErrData(bytes)) => this.rest = bytes,
                Ok(Event::Eof | Event::End(Ok(_))) => this.read_over = true,
                Ok(Event::Connected) => {}
                Ok(Event::End(Err(error))) => return Poll::Ready(Err(broken(error.into()))),
                Err(error) => return Poll::Ready(Err(broken(error))),
            }
        }
        let len = this.rest.len().min(buf.remaining());
        buf.put_slice(&this.rest[..len]);
        this.rest.advance(len);
        Poll::Ready(Ok(()))
    }
}

fn broken(error: Error) -> IoError {
    IoError::new(Io::ConnectionReset, error)
}

impl AsyncWrite for PortStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<IoResult<usize>> {
        ready!(self.poll_idle(context))?;
        let Some(mut input) = self.input.take() else { return Poll::Ready(Err(Io::BrokenPipe.into())) };
        let len = bytes.len().min(MAX_PAYLOAD);
        let piece = Bytes::copy_from_slice(&bytes[..len]);
        self.sending = Some(Box::pin(async move {
            let sent = input.send(&piece).await;
            (input, sent)
        }));
        // Begun at once; what does not go out now is waited for by the next call.
        match self.poll_idle(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(len)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<IoResult<()>> {
        self.poll_idle(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<IoResult<()>> {
        ready!(self.poll_idle(context))?;
        if let Some(input) = &mut self.input {
            input.eof();
        }
        Poll::Ready(Ok(()))
    }
}
