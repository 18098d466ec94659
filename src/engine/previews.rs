//! Previews: ports of a sandbox that have an address of their own, and who may open it.
//!
//! A preview is part of its sandbox's record. A private one is opened with a token, which is not kept: it says itself how
//! long it is good and for what, under a keyed hash whose key is the preview's secret. Whoever takes the secret away takes
//! all its tokens away.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jiff::Timestamp;

use super::Engine;
use super::error::{Error, Kind, Result};
use super::lifecycle::Request;
use super::records::{PreviewRecord, SandboxRecord, Visibility, new_id, new_preview, slug};
use super::sandbox::Sandbox;

/// What a token begins with.
pub const PREFIX: &str = "mp_";
/// The name of a token in a preview's address.
pub const TOKEN: &str = "mt";
/// Most previews of one sandbox.
pub(super) const PREVIEWS: usize = 64;
/// Version, scope, and when it ends.
const CLAIM_BYTES: usize = 10;

/// What whoever has a token may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scope {
    /// Everything that goes over HTTP.
    #[default]
    All,
    /// Look: no request that changes something, and no other protocol.
    Read,
}

impl Scope {
    /// The scope of this name.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "read" => Some(Self::Read),
            "write" | "all" => Some(Self::All),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::All => "write",
        }
    }
}

/// A preview, and where it is.
#[derive(Debug, Clone)]
pub struct Preview {
    /// The sandbox.
    pub sandbox_id: String,
    /// What is kept of it.
    pub record: PreviewRecord,
    /// Its address, without a token.
    pub url: String,
}

impl Preview {
    /// A token for this one, good until then or for as long as the secret is.
    pub fn token(&self, scope: Scope, until: Option<Timestamp>) -> String {
        let mut bytes = claim(scope, until).to_vec();
        bytes.extend_from_slice(self.seal(&bytes).as_bytes());
        format!("{PREFIX}{}", BASE64.encode(bytes))
    }

    /// What a token allows and until when, if it is one of this preview's and still good.
    pub fn allows(&self, token: &str) -> Option<(Scope, Option<Timestamp>)> {
        let bytes = BASE64.decode(token.strip_prefix(PREFIX)?).ok()?;
        let (claimed, mac) = bytes.split_at_checked(CLAIM_BYTES)?;
        // Compared in constant time.
        if blake3::Hash::from_bytes(mac.try_into().ok()?) != self.seal(claimed) {
            return None;
        }
        let scope = match claimed.first_chunk()? {
            [1, 0] => Scope::All,
            [1, 1] => Scope::Read,
            _ => return None,
        };
        let until = match i64::from_be_bytes(*claimed.last_chunk()?) {
            0 => None,
            second => Some(Timestamp::from_second(second).ok()?),
        };
        until.is_none_or(|until| Timestamp::now() < until).then_some((scope, until))
    }

    fn seal(&self, claimed: &[u8]) -> blake3::Hash {
        let key = blake3::derive_key("miosa 2026 preview token", self.record.secret.as_bytes());
        blake3::keyed_hash(&key, claimed)
    }

    /// An address that opens it as it is.
    pub fn open_url(&self) -> String {
        match self.record.visibility {
            Visibility::Public => self.url.clone(),
            Visibility::Private => self.url_with(&self.token(Scope::All, None)),
        }
    }

    /// Its address with a token.
    pub fn url_with(&self, token: &str) -> String {
        format!("{}?{TOKEN}={token}", self.url)
    }
}

fn claim(scope: Scope, until: Option<Timestamp>) -> [u8; CLAIM_BYTES] {
    let mut claim = [0; CLAIM_BYTES];
    claim[..2].copy_from_slice(&[1, u8::from(scope == Scope::Read)]);
    claim[2..].copy_from_slice(&until.map_or(0, |until| until.as_second().max(1)).to_be_bytes());
    claim
}

/// What a preview is to be.
#[derive(Debug, Clone, Default)]
pub struct CreatePreview {
    /// The port; none: the sandbox's first preview.
    pub port: Option<u16>,
    /// Who may open it; none: as it is, and a new one is private.
    pub visibility: Option<Visibility>,
    /// What the caller calls it.
    pub label: Option<String>,
}

impl Engine {
    /// Makes a preview of a port, or answers with the one that is there; durable when it answers.
    pub async fn create_preview(&self, key: &str, wanted: CreatePreview) -> Result<Preview> {
        let sandbox = self.find(key)?;
        sandbox.address()?;
        if wanted.port == Some(0) {
            return Err(no_port());
        }
        if wanted.label.as_ref().is_some_and(|label| label.len() > 256) {
            return Err(Error::invalid("a preview's label is at most 256 bytes"));
        }
        let change = move |previews: &mut Vec<PreviewRecord>| {
            let port = wanted.port.or(previews.first().map(|preview| preview.port)).ok_or_else(|| {
                Error::invalid("which port is to be opened was not said").hint("name it, such as 3000")
            })?;
            let known = previews.iter().position(|preview| preview.port == port);
            if known.is_none() && previews.len() >= PREVIEWS {
                return Err(Error::new(Kind::Busy, format!("it has {PREVIEWS} previews already")).hint("delete some"));
            }
            let at = known.unwrap_or_else(|| {
                previews.push(new_preview(port));
                previews.len() - 1
            });
            let preview = &mut previews[at];
            preview.visibility = wanted.visibility.unwrap_or(preview.visibility);
            preview.label = wanted.label.or(preview.label.take());
            Ok(preview.id.clone())
        };
        let changed = sandbox.clone();
        let id = self.detached(async move { changed.change_previews(change).await }).await?;
        sandbox.preview(&id)
    }

    /// A sandbox's previews, oldest first.
    pub fn previews(&self, key: &str) -> Result<Vec<Preview>> {
        let sandbox = self.find(key)?;
        let record = sandbox.record();
        record.previews.iter().map(|preview| sandbox.preview_of(&record, preview)).collect()
    }

    /// One, by its id or port.
    pub fn preview(&self, key: &str, id: &str) -> Result<Preview> {
        self.find(key)?.preview(id)
    }

    /// Takes its address away, and so all tokens.
    pub async fn delete_preview(&self, key: &str, id: &str) -> Result<Preview> {
        let sandbox = self.find(key)?;
        let preview = sandbox.preview(id)?;
        let gone = preview.record.id.clone();
        let change = move |previews: &mut Vec<PreviewRecord>| {
            previews.retain(|preview| preview.id != gone);
            Ok(())
        };
        self.detached(async move { sandbox.change_previews(change).await }).await?;
        Ok(preview)
    }

    /// Takes all tokens of a preview away; its address stays.
    pub async fn revoke_preview_tokens(&self, key: &str, id: &str) -> Result<Preview> {
        let sandbox = self.find(key)?;
        let id = sandbox.preview(id)?.record.id;
        let (changed, of) = (sandbox.clone(), id.clone());
        let change = move |previews: &mut Vec<PreviewRecord>| {
            for preview in previews.iter_mut().filter(|preview| preview.id == of) {
                preview.secret = new_preview(preview.port).secret;
            }
            Ok(())
        };
        self.detached(async move { changed.change_previews(change).await }).await?;
        sandbox.preview(&id)
    }

    /// The preview behind the first word of a host name: a port and, after a hyphen, a sandbox's id, name or slug.
    pub fn preview_at(&self, host: &str) -> Result<Preview> {
        let unknown = || Error::new(Kind::PreviewNotFound, format!("{host:?} is no preview of this daemon"));
        let (port, who) = host.split_once('-').ok_or_else(unknown)?;
        let port: u16 = port.parse().map_err(|_| unknown())?;
        let sandbox = self.shared.registry.sandbox_of_host(who).ok_or_else(unknown)?;
        let record = sandbox.record();
        let preview = record.previews.iter().find(|preview| preview.port == port).ok_or_else(unknown)?;
        sandbox.preview_of(&record, preview)
    }
}

/// How long a token that somebody asks for may be good.
pub fn token_end(lasts: Option<Duration>) -> Result<Option<Timestamp>> {
    let Some(lasts) = lasts else { return Ok(None) };
    let lasts = jiff::SignedDuration::try_from(lasts).ok();
    lasts.and_then(|lasts| Timestamp::now().checked_add(lasts).ok()).map(Some).ok_or_else(|| {
        Error::invalid("a token cannot be good for so long").hint("leave the time out: it is then good until revoked")
    })
}

impl Sandbox {
    /// Where previews are served.
    fn address(&self) -> Result<&str> {
        self.shared.settings.previews.as_deref().ok_or_else(|| {
            Error::new(Kind::PreviewsOff, "this daemon serves no previews")
                .hint("start it with an address for them: --preview-listen 127.0.0.1:7080")
        })
    }

    async fn change_previews<T>(
        self: Arc<Self>,
        change: impl FnOnce(&mut Vec<PreviewRecord>) -> Result<T>,
    ) -> Result<T> {
        let _owner = self.own().await;
        self.decide(Request::Update)?;
        let mut record = self.record();
        let before = record.previews.clone();
        let made = change(&mut record.previews)?;
        if record.previews != before {
            self.save_as(record.clone()).await?;
            self.publish(|r| *r = record);
        }
        Ok(made)
    }

    /// By id or port.
    fn preview(&self, id: &str) -> Result<Preview> {
        let record = self.record();
        let found = record.previews.iter().find(|preview| preview.id == id || preview.port.to_string() == id);
        let preview = found.ok_or_else(|| {
            Error::new(Kind::PreviewNotFound, format!("sandbox {} has no preview {id:?}", record.name))
                .hint(format!("list them: miosa sandbox preview {} --list", record.name))
        })?;
        self.preview_of(&record, preview)
    }

    fn preview_of(&self, sandbox: &SandboxRecord, preview: &PreviewRecord) -> Result<Preview> {
        let url = url_of(self.address()?, sandbox, preview.port);
        Ok(Preview { sandbox_id: sandbox.id.clone(), record: preview.clone(), url })
    }

    /// The address that opens its first preview, if there is one and previews are served.
    pub(super) fn preview_url(&self, record: &SandboxRecord) -> Option<String> {
        let first = record.previews.first()?;
        self.preview_of(record, first).ok().map(|preview| preview.open_url())
    }
}

/// A name that is a host name by itself is in the address; another could be like a second one's, so there the id is.
fn url_of(address: &str, sandbox: &SandboxRecord, port: u16) -> String {
    let plain = slug(&sandbox.name) == sandbox.name && sandbox.name.len() <= 56;
    let who = if plain { &sandbox.name } else { &sandbox.id };
    format!("http://{port}-{who}.{address}/")
}

/// Refuses ports that a new sandbox cannot have previews of.
pub(crate) fn check_ports(ports: &[u16]) -> Result<()> {
    if ports.contains(&0) {
        return Err(no_port());
    }
    if ports.len() > PREVIEWS {
        return Err(Error::invalid(format!("a sandbox has at most {PREVIEWS} previews")));
    }
    Ok(())
}

fn no_port() -> Error {
    Error::invalid("there is no port 0").hint("1 to 65535, such as 3000")
}

/// Previews of these ports, for a sandbox that is made.
pub(super) fn published(ports: &[u16]) -> Vec<PreviewRecord> {
    let known = |at: usize, port: &u16| ports[..at].contains(port);
    ports.iter().enumerate().filter(|(at, port)| !known(*at, port)).map(|(_, port)| new_preview(*port)).collect()
}

/// The same ports for a fork, with secrets of their own.
pub(super) fn inherited(parent: &[PreviewRecord]) -> Vec<PreviewRecord> {
    let fresh = |p: &PreviewRecord| PreviewRecord {
        id: new_id("pv"),
        visibility: p.visibility,
        label: p.label.clone(),
        ..new_preview(p.port)
    };
    parent.iter().map(fresh).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preview() -> Preview {
        Preview { sandbox_id: "sb-1".into(), record: new_preview(3_000), url: "http://3000-web.localhost:1/".into() }
    }

    #[test]
    fn a_token_opens_its_own_preview_for_what_and_as_long_as_it_says() {
        let (one, other) = (preview(), preview());
        let token = one.token(Scope::All, None);
        assert_eq!(one.allows(&token), Some((Scope::All, None)));
        assert_eq!(other.allows(&token), None);
        let until = Timestamp::from_second(Timestamp::now().as_second() + 1_000).unwrap();
        assert_eq!(one.allows(&one.token(Scope::Read, Some(until))), Some((Scope::Read, Some(until))));
        let past = Timestamp::from_second(Timestamp::now().as_second() - 1).unwrap();
        assert_eq!(one.allows(&one.token(Scope::All, Some(past))), None);
        assert_eq!(one.allows(&one.token(Scope::All, Some(Timestamp::from_second(-5).unwrap()))), None);
    }

    #[test]
    fn a_token_that_was_changed_anywhere_is_none() {
        let one = preview();
        let until = Timestamp::now() + jiff::SignedDuration::from_hours(1);
        let bytes = BASE64.decode(one.token(Scope::Read, Some(until)).strip_prefix(PREFIX).unwrap()).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(one.allows(&format!("{PREFIX}{}", BASE64.encode(changed))), None, "byte {at}");
        }
        for len in 0..bytes.len() {
            assert_eq!(one.allows(&format!("{PREFIX}{}", BASE64.encode(&bytes[..len]))), None, "{len} bytes");
        }
        for text in ["", "mp_", "mp_*", "x"] {
            assert_eq!(one.allows(text), None, "{text:?}");
        }
    }
}
