//! One connection to the agent: a task that reads frames, a task that writes them, and the table of open streams.
//!
//! The reading task never waits for a consumer: what a stream may hold is bounded by the credit it was given, and a
//! guest that sends more has broken the protocol.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use miosa_agent::wire::{self, Decoder, Frame, Kind, Outcome, Request, Violation};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::{Error, ErrorKind, Result};

/// Bytes of requests and data that may wait for the socket.
const QUEUE_BYTES: usize = 512 * 1024;

/// What happens on a stream.
#[derive(Debug)]
pub(super) enum Event {
    Data(Bytes),
    ErrData(Bytes),
    /// The connection that was asked for is there.
    Connected,
    /// The guest's half of it is closed.
    Eof,
    /// The last event.
    End(Outcome),
}

#[derive(Clone, Debug)]
pub(super) struct Connection {
    inner: Arc<Inner>,
}

/// Owns the two tasks: they end with the last handle.
#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

type Queued = (Frame, Option<OwnedSemaphorePermit>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    queue: mpsc::UnboundedSender<Queued>,
    /// Bounds what is queued by callers who can wait; window, eof and cancel frames are few and pass by.
    room: Arc<Semaphore>,
    lost: OnceLock<Error>,
}

#[derive(Debug, Default)]
struct Table {
    next: u32,
    streams: HashMap<u32, Entry>,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    events: mpsc::UnboundedSender<Event>,
    /// What the guest may still send.
    granted: u32,
    /// What we may still send; closed when the stream is over.
    credit: Arc<Semaphore>,
    /// How far a connection has come; none for all other streams.
    half: Option<Half>,
}

/// The guest's half of a connection to one of its ports. Each step is told once, so that a flood of them is bounded, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Waiting,
    Open,
    Closed,
}

impl Connection {
    /// Greets the guest and waits for its answer, however long that takes.
    pub(super) async fn open(stream: UnixStream) -> Result<Connection> {
        let nonce: [u8; 16] = rand::random();
        let (reader, writer) = stream.into_split();
        let (queue, queued) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            table: Mutex::new(Table { next: 1, ..Table::default() }),
            queue,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            lost: OnceLock::new(),
        });
        let (greeted, greeting) = tokio::sync::oneshot::channel();
        let write = tokio::spawn(write_task(writer, nonce, queued, shared.clone()));
        let read = tokio::spawn(read_task(reader, nonce, greeted, shared.clone()));
        let connection = Connection { inner: Arc::new(Inner { shared, tasks: [write, read] }) };
        match greeting.await {
            Ok(wire::VERSION) => Ok(connection),
            Ok(version) => {
                let message = format!("the guest's agent speaks version {version}, this host {}", wire::VERSION);
                Err(Error::new(ErrorKind::AgentLost, message).hint("build the initramfs again, then restart the VM"))
            }
            Err(_) => Err(connection.inner.shared.lost_error()),
        }
    }

    /// Ends everything; the socket closes when the aborted tasks are dropped.
    pub(super) fn close(&self) {
        self.inner.tasks.iter().for_each(JoinHandle::abort);
        self.inner.shared.lose("closed on this side");
    }

    pub(super) async fn stream(&self, request: &Request) -> Result<Stream> {
        let frame = Frame::with(0, Kind::Open, request)
            .map_err(|v| Error::new(ErrorKind::Invalid, v.0).hint("send large data by file or standard input"))?;
        let permit = self.inner.shared.permit(frame.payload.len()).await?;
        let (events, receiver) = mpsc::unbounded_channel();
        let credit = Arc::new(Semaphore::new(wire::WINDOW as usize));
        // Queued under the table's lock, so that no frame of the stream can be queued before it.
        let mut table = self.inner.shared.table.lock();
        if table.closed {
            return Err(self.inner.shared.lost_error());
        }
        let id = loop {
            let id = table.next;
            table.next = table.next.checked_add(1).unwrap_or(1);
            if !table.streams.contains_key(&id) {
                break id;
            }
        };
        let half = matches!(request, Request::Connect { .. }).then_some(Half::Waiting);
        table.streams.insert(id, Entry { events, granted: wire::WINDOW, credit: credit.clone(), half });
        self.inner.shared.send(Frame { stream: id, ..frame }, Some(permit));
        drop(table);
        Ok(Stream { inner: self.inner.clone(), id, events: receiver, credit, owed: 0, over: false })
    }
}

impl Shared {
    fn lost_error(&self) -> Error {
        let unknown = || Error::new(ErrorKind::AgentLost, "the connection to the guest's agent is gone");
        self.lost.get().cloned().unwrap_or_else(unknown)
    }

    /// Ends every stream; only the first reason counts.
    fn lose(&self, why: impl std::fmt::Display) {
        let _ = self.lost.set(Error::new(ErrorKind::AgentLost, format!("lost the guest's agent: {why}")));
        let mut table = self.table.lock();
        table.closed = true;
        for (_, entry) in table.streams.drain() {
            entry.credit.close();
        }
        drop(table);
        self.room.close();
    }

    fn send(&self, frame: Frame, permit: Option<OwnedSemaphorePermit>) {
        // The queue only closes with the connection, and then every stream hears of that.
        let _ = self.queue.send((frame, permit));
    }

    async fn permit(&self, len: usize) -> Result<OwnedSemaphorePermit> {
        let cost = wire::cost(len);
        self.room.clone().acquire_many_owned(cost).await.map_err(|_| self.lost_error())
    }

    fn dispatch(&self, frame: Frame) -> Result<(), Violation> {
        let mut table = self.table.lock();
        // Frames of a stream that we have given up may still be under way.
        let Some(entry) = table.streams.get_mut(&frame.stream) else { return Ok(()) };
        match frame.kind {
            Kind::Data | Kind::ErrData if matches!(entry.half, None | Some(Half::Open)) => {
                let cost = wire::cost(frame.payload.len());
                entry.granted = entry.granted.checked_sub(cost).ok_or(Violation("guest sent more than it may"))?;
                let event = if frame.kind == Kind::Data { Event::Data } else { Event::ErrData };
                let _ = entry.events.send(event(frame.payload));
            }
            Kind::Connected if entry.half == Some(Half::Waiting) => {
                entry.half = Some(Half::Open);
                let _ = entry.events.send(Event::Connected);
            }
            Kind::Eof if entry.half == Some(Half::Open) => {
                entry.half = Some(Half::Closed);
                let _ = entry.events.send(Event::Eof);
            }
            Kind::Window => {
                let credit = frame.credit()? as usize;
                if entry.credit.available_permits() + credit > wire::WINDOW as usize {
                    return Err(Violation("guest gave too much credit"));
                }
                entry.credit.add_permits(credit);
            }
            Kind::End => {
                let outcome: Outcome = frame.parse()?;
                if let Some(entry) = table.streams.remove(&frame.stream) {
                    entry.credit.close();
                    let _ = entry.events.send(Event::End(outcome));
                }
            }
            _ => return Err(Violation("guest sent a frame that has no place there")),
        }
        Ok(())
    }
}

async fn write_task(
    mut socket: OwnedWriteHalf,
    nonce: [u8; 16],
    mut queued: mpsc::UnboundedReceiver<Queued>,
    shared: Arc<Shared>,
) {
    let mut bytes = wire::greeting(nonce);
    loop {
        if let Err(error) = socket.write_all(&bytes).await {
            return shared.lose(error);
        }
        bytes.clear();
        let Some((frame, permit)) = queued.recv().await else { return };
        frame.encode(&mut bytes);
        let mut permits = vec![permit];
        while bytes.len() < wire::MAX_PAYLOAD
            && let Ok((frame, permit)) = queued.try_recv()
        {
            frame.encode(&mut bytes);
            permits.push(permit);
        }
    }
}

async fn read_task(
    mut socket: OwnedReadHalf,
    nonce: [u8; 16],
    greeted: tokio::sync::oneshot::Sender<u32>,
    shared: Arc<Shared>,
) {
    let mut decoder = Decoder::host(nonce);
    let mut greeted = Some(greeted);
    let mut bytes = vec![0; wire::MAX_PAYLOAD];
    let why = loop {
        match socket.read(&mut bytes).await {
            Ok(0) => break "the machine closed the connection".to_owned(),
            Ok(len) => decoder.push(&bytes[..len]),
            Err(error) => break error.to_string(),
        }
        if let Err(violation) = take_frames(&mut decoder, &mut greeted, &shared) {
            break violation.to_string();
        }
    };
    shared.lose(why);
}

fn take_frames(
    decoder: &mut Decoder,
    greeted: &mut Option<tokio::sync::oneshot::Sender<u32>>,
    shared: &Shared,
) -> Result<(), Violation> {
    while let Some(frame) = decoder.next_frame()? {
        match (frame.kind, greeted.take()) {
            (Kind::HelloAck, Some(greeted)) => {
                let _ = greeted.send(frame.hello()?.1);
            }
            (Kind::HelloAck, None) => return Err(Violation("guest greeted twice")),
            _ => shared.dispatch(frame)?,
        }
    }
    Ok(())
}

/// The host's end of a stream. Dropped before its end, it cancels what the guest does for it.
#[derive(Debug)]
pub(super) struct Stream {
    inner: Arc<Inner>,
    id: u32,
    events: mpsc::UnboundedReceiver<Event>,
    credit: Arc<Semaphore>,
    /// Credit for what was taken and not yet given back.
    owed: u32,
    over: bool,
}

impl Stream {
    /// The next event. After `End` there are none: then, as when the connection is lost, an error. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Event> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Stream::next`], polled.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Event>> {
        let event = match ready!(self.events.poll_recv(context)) {
            Some(event) => event,
            None => return Poll::Ready(Err(self.inner.shared.lost_error())),
        };
        match &event {
            Event::Data(bytes) | Event::ErrData(bytes) => self.give_back(wire::cost(bytes.len())),
            Event::Connected | Event::Eof => {}
            Event::End(_) => self.over = true,
        }
        Poll::Ready(Ok(event))
    }

    fn give_back(&mut self, credit: u32) {
        self.owed += credit;
        if self.owed < wire::WINDOW / 4 {
            return;
        }
        let mut table = self.inner.shared.table.lock();
        if let Some(entry) = table.streams.get_mut(&self.id) {
            entry.granted += self.owed;
            self.inner.shared.send(Frame::window(self.id, self.owed), None);
        }
        self.owed = 0;
    }

    pub(super) fn control(&self) -> Control {
        Control { inner: Arc::downgrade(&self.inner), id: self.id }
    }

    pub(super) fn input(&self) -> Input {
        Input { inner: self.inner.clone(), id: self.id, credit: self.credit.clone(), closed: false }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut table = self.inner.shared.table.lock();
        if let Some(entry) = table.streams.remove(&self.id) {
            entry.credit.close();
            self.inner.shared.send(Frame::new(self.id, Kind::Cancel, Bytes::new()), None);
        }
    }
}

/// The way for what is no data and needs no credit.
#[derive(Clone, Debug)]
pub(super) struct Control {
    inner: Weak<Inner>,
    id: u32,
}

impl Control {
    pub(super) async fn send(&self, kind: Kind, value: &impl serde::Serialize) -> Result<()> {
        let frame =
            Frame::with(self.id, kind, value).map_err(|violation| Error::new(ErrorKind::Invalid, violation.0))?;
        let Some(inner) = self.inner.upgrade() else { return Err(over()) };
        let permit = inner.shared.permit(frame.payload.len()).await?;
        // Its number is another's, some day.
        let table = inner.shared.table.lock();
        if !table.streams.contains_key(&self.id) {
            return Err(over());
        }
        inner.shared.send(frame, Some(permit));
        Ok(())
    }
}

fn over() -> Error {
    Error::new(ErrorKind::AgentLost, "the stream is over: nobody reads what is sent")
}

/// The sending side of a stream.
#[derive(Debug)]
pub(super) struct Input {
    inner: Arc<Inner>,
    id: u32,
    credit: Arc<Semaphore>,
    closed: bool,
}

impl Input {
    /// Sends bytes as the guest gives credit for them. Cancelled half-way, some of them are sent.
    pub(super) async fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() && !self.closed {
            // Credit is only ever taken by this one sender, so what is there stays there.
            let least = self.credit.clone().acquire_many_owned(wire::cost(0)).await.map_err(|_| over())?;
            let available = (self.credit.available_permits() as u32).saturating_add(wire::cost(0));
            let len = wire::sendable(available, bytes.len());
            let permit = self.inner.shared.permit(len).await?;
            let rest = self.credit.try_acquire_many(wire::cost(len) - wire::cost(0)).map_err(|_| over())?;
            rest.forget();
            least.forget();
            let (now, later) = bytes.split_at(len);
            self.inner.shared.send(Frame::new(self.id, Kind::Data, Bytes::copy_from_slice(now)), Some(permit));
            bytes = later;
        }
        if bytes.is_empty() { Ok(()) } else { Err(over()) }
    }

    /// Says that nothing more follows.
    pub(super) fn eof(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            self.inner.shared.send(Frame::new(self.id, Kind::Eof, Bytes::new()), None);
        }
    }
}
