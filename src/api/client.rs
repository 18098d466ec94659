//! The API's client: one connection a request, bodies streamed both ways. It speaks to the daemon over its socket, or to a
//! server within this process over a pipe ([`within`]).

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, Stream, StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::types::{ErrorBody, ErrorEnvelope};

/// Most bytes of a JSON answer: beyond any that the daemon gives.
const MAX_ANSWER: usize = 256 << 20;
/// Most bytes of one event.
const MAX_EVENT: usize = 4 << 20;

/// Content type of a body that is a file's bytes.
pub const BYTES: &str = "application/octet-stream";
/// Content type of a body that is a tar archive.
pub const ARCHIVE: &str = "application/x-tar";
/// Content type of a body that carries states of the store.
pub const MIOSA_ARCHIVE: &str = "application/x-miosa-archive";

/// Header of a published image: what it is called.
pub const IMAGE_NAME: &str = "x-image-name";
/// Header of a published image: its digest.
pub const IMAGE_DIGEST: &str = "x-image-digest";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers.
    #[error("the daemon cannot be reached on {place}: {source}")]
    Unreachable {
        /// Where it was sought: a socket or an address.
        place: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The daemon answered with an error.
    #[error("{}", body.message)]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        body: Box<ErrorBody>,
    },
    /// The conversation broke off.
    #[error("the daemon's answer broke off: {0}")]
    Broken(String),
    /// What was to be sent could not be read here.
    #[error("{0}")]
    Local(std::io::Error),
}

/// Result of a call.
pub type Result<T> = std::result::Result<T, Error>;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A client of one server.
#[derive(Debug, Clone)]
pub struct Client {
    way: Way,
}

/// How the server is reached.
#[derive(Debug, Clone)]
enum Way {
    Socket(PathBuf),
    Address { host: String, key: Option<HeaderValue> },
    Within(mpsc::Sender<DuplexStream>),
}

/// Either kind of connection.
trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Takes the connections of a client in the same process.
#[derive(Debug)]
pub struct Within(mpsc::Receiver<DuplexStream>);

/// A client, and what its server listens to.
pub fn within() -> (Client, Within) {
    let (send, receive) = mpsc::channel(8);
    (Client { way: Way::Within(send) }, Within(receive))
}

impl axum::serve::Listener for Within {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.recv().await {
            Some(connection) => (connection, ()),
            // No client is left; whoever serves ends the server.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Client {
    /// A client of the daemon that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { way: Way::Socket(socket.to_owned()) }
    }

    /// A client of the daemon at `unix:///PATH` or `http://HOST:PORT`; that one is sent the key.
    pub fn at(endpoint: &str, key: Option<&str>) -> std::result::Result<Self, String> {
        if let Some(path) = endpoint.strip_prefix("unix://") {
            return match path.starts_with('/') {
                true => Ok(Self::new(Path::new(path))),
                false => Err(format!("{endpoint:?} names no file: unix:///PATH")),
            };
        }
        let Some(rest) = endpoint.strip_prefix("http://") else {
            return Err(format!("{endpoint:?} is no endpoint: write http://HOST:PORT or unix:///PATH"));
        };
        let host = rest.trim_end_matches('/').trim_end_matches("/api/v1");
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        if host.is_empty() || host.contains(['/', '@', '?', '#']) {
            return Err(format!("{endpoint:?} is no endpoint: write http://HOST:PORT"));
        }
        let host = if has_port { host.to_owned() } else { format!("{host}:80") };
        let key = match key.map(|key| HeaderValue::try_from(format!("Bearer {}", key.trim()))) {
            None => None,
            Some(Ok(mut value)) => {
                // Keeps it out of everything that is printed.
                value.set_sensitive(true);
                Some(value)
            }
            Some(Err(_)) => return Err("the key has characters that no key has".to_owned()),
        };
        Ok(Self { way: Way::Address { host, key } })
    }

    /// Whether somebody listens.
    pub async fn is_answered(&self) -> Result<()> {
        self.connect().await.map(drop)
    }

    async fn connect(&self) -> Result<Box<dyn Connection>> {
        match &self.way {
            Way::Socket(socket) => match UnixStream::connect(socket).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(source) => Err(Error::Unreachable { place: socket.display().to_string(), source }),
            },
            Way::Address { host, .. } => match TcpStream::connect(host).await {
                Ok(stream) => {
                    let _ = stream.set_nodelay(true);
                    Ok(Box::new(stream))
                }
                Err(source) => Err(Error::Unreachable { place: format!("http://{host}"), source }),
            },
            Way::Within(server) => {
                let (here, there) = tokio::io::duplex(1 << 20);
                server.send(there).await.map_err(|_| Error::Broken("the store has been closed".to_owned()))?;
                Ok(Box::new(here))
            }
        }
    }

    /// `GET`, and the answer's `data`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(Method::GET, path, None::<&()>).await
    }

    /// `POST` with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.json(Method::POST, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(Method::DELETE, path, None::<&()>).await
    }

    /// `POST` with a body that is read as it is sent, and the answer's `data`.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        kind: &str,
        content: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<T> {
        // A failure to read here surfaces as a broken connection; it is told as what it was.
        let failed = std::sync::Arc::new(parking_lot::Mutex::new(None));
        let note = failed.clone();
        let body = StreamBody::new(content.map_ok(Frame::data).inspect_err(move |e| {
            *note.lock() = Some(std::io::Error::new(e.kind(), e.to_string()));
        }));
        let answered = self.send(Method::POST, path, BodyExt::boxed_unsync(body), kind).await;
        if let Some(error) = failed.lock().take() {
            return Err(Error::Local(error));
        }
        decode(answered?).await
    }

    /// `GET` of a body that is read as it comes.
    pub async fn download(&self, path: &str) -> Result<Download> {
        let response = self.send(Method::GET, path, empty(), "application/json").await?;
        Ok(Download::from(response))
    }

    /// `POST` with a JSON body, answered with a body that is read as it comes.
    pub async fn post_download(&self, path: &str, body: &impl Serialize) -> Result<Download> {
        Ok(Download::from(self.send(Method::POST, path, encode(body)?, "application/json").await?))
    }

    /// `POST` that answers with events.
    pub async fn events(&self, path: &str, body: &impl Serialize) -> Result<Events> {
        let response = self.send(Method::POST, path, encode(body)?, "application/json").await?;
        Ok(Events { download: Download::from(response), pending: BytesMut::new() })
    }

    /// `GET` that turns the connection into a stream of bytes; each direction is closed on its own.
    pub async fn tunnel(&self, path: &str) -> Result<TokioIo<Upgraded>> {
        let response = self.send_for(Method::GET, path, empty(), "application/json", Some("tcp")).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Error::Broken("it has another shape: it is no stream".to_owned()));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| Error::Broken(describe(&e)))?;
        Ok(TokioIo::new(upgraded))
    }

    /// `GET`, answered with server-sent events.
    pub async fn watch(&self, path: &str) -> Result<Events> {
        let response = self.send(Method::GET, path, empty(), "application/json").await?;
        Ok(Events { download: Download::from(response), pending: BytesMut::new() })
    }

    /// `GET`, answered with a WebSocket.
    pub async fn socket(&self, path: &str) -> Result<Socket> {
        let host = if let Way::Address { host, .. } = &self.way { host.as_str() } else { "miosa" };
        let broken = |e: tungstenite::Error| Error::Broken(e.to_string());
        let mut request = format!("ws://{host}/api/v1{path}").into_client_request().map_err(broken)?;
        if let Way::Address { key: Some(key), .. } = &self.way {
            request.headers_mut().insert(AUTHORIZATION, key.clone());
        }
        let stream = self.connect().await?;
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(Socket(socket)),
            Err(tungstenite::Error::Http(response)) => {
                let bytes = response.body().as_deref().unwrap_or_default();
                let status = response.status();
                Err(Error::Refused { status: status.as_u16(), body: Box::new(refusal(status, bytes)) })
            }
            Err(error) => Err(broken(error)),
        }
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<T> {
        let body = match body {
            Some(body) => encode(body)?,
            None => empty(),
        };
        decode(self.send(method, path, body, "application/json").await?).await
    }

    /// Sends, and sees that the answer is a success.
    async fn send(&self, method: Method, path: &str, body: Body, kind: &str) -> Result<Response<Incoming>> {
        self.send_for(method, path, body, kind, None).await
    }

    /// The same, asking for another protocol on the connection.
    async fn send_for(
        &self,
        method: Method,
        path: &str,
        body: Body,
        kind: &str,
        protocol: Option<&str>,
    ) -> Result<Response<Incoming>> {
        tracing::debug!(%method, path, "request");
        let stream = self.connect().await?;
        let broken = |e: hyper::Error| Error::Broken(describe(&e));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(async move {
            // Its errors reach the request or the body, too.
            let _ = connection.with_upgrades().await;
        });
        let mut request = Request::builder().method(method).uri(format!("/api/v1{path}")).header(CONTENT_TYPE, kind);
        request = match &self.way {
            Way::Address { host, key } => {
                let request = request.header(HOST, host);
                if let Some(key) = key { request.header(AUTHORIZATION, key) } else { request }
            }
            _ => request.header(HOST, "miosa"),
        };
        if let Some(protocol) = protocol {
            request = request.header(CONNECTION, "upgrade").header(UPGRADE, protocol);
        }
        let request = request.body(body).map_err(|e| Error::Broken(format!("the request could not be made: {e}")))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let bytes = collect(response).await.unwrap_or_default();
        Err(Error::Refused { status: status.as_u16(), body: Box::new(refusal(status, &bytes)) })
    }
}

fn refusal(status: StatusCode, bytes: &[u8]) -> ErrorBody {
    match serde_json::from_slice::<ErrorEnvelope>(bytes) {
        Ok(envelope) => envelope.error,
        Err(_) => ErrorBody {
            code: "bad_answer".to_owned(),
            message: format!("the daemon answered {status}, without a reason that can be read"),
            ..ErrorBody::default()
        },
    }
}

fn empty() -> Body {
    Full::default().map_err(|e: std::convert::Infallible| match e {}).boxed_unsync()
}

fn encode(body: &impl Serialize) -> Result<Body> {
    let bytes =
        serde_json::to_vec(body).map_err(|e| Error::Broken(format!("the request could not be encoded: {e}")))?;
    Ok(Full::from(bytes).map_err(|e: std::convert::Infallible| match e {}).boxed_unsync())
}

async fn collect(response: Response<Incoming>) -> Result<Bytes> {
    let mut download = Download::from(response);
    let mut all = BytesMut::new();
    while let Some(piece) = download.next_piece().await? {
        if all.len() + piece.len() > MAX_ANSWER {
            return Err(Error::Broken("it is too large".to_owned()));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all.freeze())
}

async fn decode<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T> {
    let bytes = collect(response).await?;
    let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| Error::Broken(format!("it is not JSON: {e}")))?;
    serde_json::from_value(value["data"].take()).map_err(|e| Error::Broken(format!("it has another shape: {e}")))
}

fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A body that is read as it comes.
#[derive(Debug)]
pub struct Download {
    headers: HeaderMap,
    body: Incoming,
}

impl From<Response<Incoming>> for Download {
    fn from(response: Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        Self { headers: head.headers, body }
    }
}

impl Download {
    /// Whether it is a tar archive.
    pub fn is_archive(&self) -> bool {
        self.headers.get(CONTENT_TYPE).is_some_and(|kind| kind == ARCHIVE)
    }

    /// A header, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The next piece; none at the end. A body that breaks off is an error.
    pub async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|e| Error::Broken(describe(&e)))?;
            if let Ok(piece) = frame.into_data() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

/// A WebSocket: bytes, and small documents between them.
pub struct Socket(tokio_tungstenite::WebSocketStream<Box<dyn Connection>>);

/// What comes over a [`Socket`].
#[derive(Debug)]
pub enum Message {
    /// Bytes.
    Data(Bytes),
    /// A document.
    Control(Value),
    /// Nothing, but from somebody who is there.
    Alive,
}

impl Socket {
    /// What is sent, and what comes.
    pub fn split(self) -> (SocketSender, impl Stream<Item = Result<Message>> + Send + Unpin) {
        let (sender, receiver) = self.0.split();
        let messages = receiver.filter_map(|message| {
            std::future::ready(match message {
                Ok(tungstenite::Message::Binary(bytes)) => Some(Ok(Message::Data(bytes))),
                Ok(tungstenite::Message::Text(text)) => {
                    let value = serde_json::from_str(&text).map_err(|e| Error::Broken(format!("it is not JSON: {e}")));
                    Some(value.map(Message::Control))
                }
                Ok(tungstenite::Message::Ping(_) | tungstenite::Message::Pong(_)) => Some(Ok(Message::Alive)),
                Ok(_) => None,
                Err(error) => Some(Err(Error::Broken(error.to_string()))),
            })
        });
        (SocketSender(sender), messages)
    }
}

/// The sending side of a [`Socket`].
pub struct SocketSender(SplitSink<tokio_tungstenite::WebSocketStream<Box<dyn Connection>>, tungstenite::Message>);

impl SocketSender {
    /// Sends bytes or a document.
    pub async fn send(&mut self, message: Message) -> Result<()> {
        let message = match message {
            Message::Data(bytes) => tungstenite::Message::Binary(bytes),
            Message::Control(value) => tungstenite::Message::text(value.to_string()),
            Message::Alive => tungstenite::Message::Ping(Bytes::new()),
        };
        self.0.send(message).await.map_err(|e| Error::Broken(e.to_string()))
    }
}

/// Server-sent events.
#[derive(Debug)]
pub struct Events {
    download: Download,
    pending: BytesMut,
}

impl Events {
    /// The next event: its name and its data.
    pub async fn next_event(&mut self) -> Result<Option<(String, Value)>> {
        loop {
            while let Some(end) = self.pending.windows(2).position(|w| w == b"\n\n") {
                let text = self.pending.split_to(end + 2);
                if let Some(event) = parse_event(&text)? {
                    return Ok(Some(event));
                }
            }
            match self.download.next_piece().await? {
                Some(piece) if self.pending.len() + piece.len() <= MAX_EVENT => self.pending.extend_from_slice(&piece),
                Some(_) => return Err(Error::Broken("an event is too large".to_owned())),
                None => return Ok(None),
            }
        }
    }
}

/// A comment is no event.
fn parse_event(text: &[u8]) -> Result<Option<(String, Value)>> {
    let text = std::str::from_utf8(text).map_err(|e| Error::Broken(format!("an event is not text: {e}")))?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim_start);
    let Some(data) = field("data:") else { return Ok(None) };
    let data = serde_json::from_str(data).map_err(|e| Error::Broken(format!("an event is not JSON: {e}")))?;
    Ok(Some((field("event:").unwrap_or("message").to_owned(), data)))
}

/// A piece of a path: everything but letters, digits and `-._~` is escaped.
pub fn escape(text: &str) -> String {
    use std::fmt::Write;
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_and_comments_are_told_apart() {
        let event = parse_event(b"event: exit\ndata: {\"exit_code\":3}\n\n").unwrap().unwrap();
        assert_eq!(event, ("exit".to_owned(), serde_json::json!({ "exit_code": 3 })));
        assert!(parse_event(b": alive\n\n").unwrap().is_none());
        assert!(parse_event(b"event: x\ndata: {\n\n").is_err());
    }

    #[test]
    fn endpoints_are_sockets_or_addresses() {
        let host = |endpoint: &str| match Client::at(endpoint, Some("k")).unwrap().way {
            Way::Address { host, key } => (host, key.unwrap()),
            way => panic!("{way:?}"),
        };
        for endpoint in ["http://127.0.0.1:7070", "http://127.0.0.1:7070/", "http://127.0.0.1:7070/api/v1"] {
            assert_eq!(host(endpoint).0, "127.0.0.1:7070");
        }
        assert_eq!(host("http://[::1]").0, "[::1]:80");
        assert!(!format!("{:?}", Client::at("http://x", Some("secret")).unwrap()).contains("secret"));
        assert!(
            matches!(Client::at("unix:///run/m.sock", None).unwrap().way, Way::Socket(p) if p == Path::new("/run/m.sock"))
        );
        for wrong in ["", "x", "https://x", "http://", "http://u:p@x", "http://x/y", "unix://x", "ftp://x"] {
            assert!(Client::at(wrong, None).is_err(), "{wrong}");
        }
        assert!(Client::at("http://x", Some("a\nb")).is_err());
    }

    #[test]
    fn names_are_escaped_whole() {
        assert_eq!(escape("after deps/1?#%"), "after%20deps%2F1%3F%23%25");
        assert_eq!(escape("sb-0.a_~"), "sb-0.a_~");
    }
}
