//! Who may call over TCP: those with a key. (The Unix socket asks the kernel who calls; see `serve::listen`.)

use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State as AppState};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;

use super::answer::ApiError;

/// Fewest characters of a key.
const MIN_KEY: usize = 16;

/// The keys that are taken. Only their digests are kept, and digests are compared in constant time.
pub struct Keys(Vec<blake3::Hash>);

impl Keys {
    /// Of a file: one a line, with empty lines and `#` comments. It must be its owner's alone.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let refuse = |why: String| Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        let mode = std::fs::metadata(path)?.mode();
        if mode & 0o077 != 0 {
            return refuse(format!("others can read it: chmod 600 {}", path.display()));
        }
        let text = std::fs::read_to_string(path)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut keys = Vec::new();
        for key in lines {
            if key.len() < MIN_KEY || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return refuse(format!("a key has at least {MIN_KEY} printable characters and no spaces"));
            }
            keys.push(blake3::hash(key.as_bytes()));
        }
        if keys.is_empty() {
            return refuse("there is no key in it".to_owned());
        }
        Ok(Self(keys))
    }

    /// Of a file that is made, with one random key, if it is not there.
    pub fn read_or_make(path: &Path) -> std::io::Result<Self> {
        match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let key: [u8; 32] = rand::random();
                writeln!(file, "msk_{}", BASE64.encode(key))?;
                file.sync_all()?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        Self::read(path)
    }

    fn take(&self, key: &[u8]) -> bool {
        let digest = blake3::hash(key);
        // Every key is compared, so that how long this takes says nothing.
        self.0.iter().fold(false, |taken, known| taken | (*known == digest))
    }
}

/// Lets requests with a key through.
pub(super) async fn require_key(AppState(keys): AppState<Arc<Keys>>, request: Request, next: Next) -> Response {
    match key_of(request.headers()) {
        Some(key) if keys.take(key) => next.run(request).await,
        Some(_) => refused("invalid_api_key", "the key is none that this daemon takes"),
        None => refused("api_key_required", "this address takes requests with a key only"),
    }
}

fn refused(code: &str, message: &str) -> Response {
    let error = ApiError::new(401, code, message)
        .hint("send the header 'Authorization: Bearer KEY'; the command line takes it from MIOSA_API_KEY");
    let mut response = error.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

fn key_of(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        return scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii());
    }
    headers.get("x-api-key").map(|value| value.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn keys_are_taken_whole_and_as_written() {
        let (_dir, path) = file("# ours\n\n0123456789abcdef\n  fedcba9876543210  \n", 0o600);
        let keys = Keys::read(&path).unwrap();
        assert!(keys.take(b"0123456789abcdef") && keys.take(b"fedcba9876543210"));
        for wrong in [&b""[..], b"0123456789abcde", b"0123456789abcdef0", b"0123456789ABCDEF", b"# ours"] {
            assert!(!keys.take(wrong));
        }
    }

    #[test]
    fn a_file_that_is_not_safe_or_holds_no_key_is_refused() {
        for (text, mode) in [
            ("0123456789abcdef", 0o644),
            ("", 0o600),
            ("# none", 0o600),
            ("short", 0o600),
            ("0123456789 abcdef", 0o600),
        ] {
            let (_dir, path) = file(text, mode);
            assert!(Keys::read(&path).is_err(), "{text:?} {mode:o}");
        }
    }

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api-key");
        Keys::read_or_make(&path).unwrap();
        let key = std::fs::read_to_string(&path).unwrap();
        assert!(Keys::read_or_make(&path).unwrap().take(key.trim().as_bytes()));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_key_is_found_in_either_header() {
        let headers = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            headers
        };
        assert_eq!(key_of(&headers("authorization", "Bearer k")), Some(&b"k"[..]));
        assert_eq!(key_of(&headers("authorization", "bearer  k ")), Some(&b"k"[..]));
        assert_eq!(key_of(&headers("x-api-key", "k")), Some(&b"k"[..]));
        assert_eq!(key_of(&headers("authorization", "Basic k")), None);
        assert_eq!(key_of(&headers("authorization", "B")), None);
        assert_eq!(key_of(&HeaderMap::new()), None);
    }
}
