//! What the daemon gives every guest at the start of a session: certificates, files and an environment, as configured.
//!
//! Certificates lie in the guest's memory file system, where nothing of them gets into a disk, a snapshot or a template;
//! programs find them through the environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmm::Agent;

use super::error::{Error, Kind, Result};
use super::guest::{check_env, check_path};

/// Where the certificates are in the guest.
const CA_BUNDLE: &str = "/run/miosa/ca-bundle.pem";
/// Where apt is told of them, which has no variable of its own.
const APT_CONFIG: &str = "/run/miosa/apt.conf";
/// Where Debian keeps what a guest trusts itself.
const GUESTS_OWN: &str = "/etc/ssl/certs/ca-certificates.crt";
/// By these, programs find a bundle.
const CA_VARIABLES: [&str; 11] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "NIX_SSL_CERT_FILE",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
];
/// Largest file given to guests.
const MAX_FILE: u64 = 16 << 20;

/// What every guest is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestSetup {
    /// Environment of every exec; a sandbox's own comes after it.
    pub env: BTreeMap<String, String>,
    /// Files put into every guest at the start of its sessions, such as a registry's configuration.
    pub files: Vec<GuestFile>,
    /// Certificates in PEM, of the host, that guests trust besides their own.
    pub ca_bundle: Option<PathBuf>,
}

/// A file of the host's that every guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Where in the guest.
    pub path: String,
    /// Where on the host.
    pub source: PathBuf,
}

impl GuestSetup {
    /// Looks whether all that is named is there, so that a mistake is told at the start and not by the first guest.
    pub fn check(&self) -> Result<()> {
        check_env(&self.env)?;
        for file in &self.files {
            check_path(&file.path)?;
            read(&file.source)?;
        }
        self.ca_bundle.as_deref().map(read_bundle).transpose().map(drop)
    }

    /// The environment, with where the certificates are.
    pub(super) fn environment(&self) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        if self.ca_bundle.is_some() {
            env.extend(CA_VARIABLES.map(|name| (name.to_owned(), CA_BUNDLE.to_owned())));
            env.insert("APT_CONFIG".to_owned(), APT_CONFIG.to_owned());
        }
        env.extend(self.env.clone());
        env
    }

    /// Puts files and certificates into a guest. The host's files are read anew each time: certificates are renewed.
    pub(super) async fn apply(&self, agent: &Agent) -> Result<()> {
        for file in &self.files {
            let source = file.source.clone();
            put(agent, &file.path, &blocking(move || read(&source)).await?).await?;
        }
        let Some(bundle) = self.ca_bundle.clone() else { return Ok(()) };
        let mut certificates = blocking(move || read_bundle(&bundle)).await?;
        if let Ok(own) = agent.read_file(GUESTS_OWN).await
            && let Ok(own) = own.read_to_end(MAX_FILE as usize).await
        {
            certificates.push(b'\n');
            certificates.extend_from_slice(&own);
        }
        put(agent, CA_BUNDLE, &certificates).await?;
        put(agent, APT_CONFIG, format!("Acquire::https::CAInfo \"{CA_BUNDLE}\";\n").as_bytes()).await
    }
}

async fn blocking(work: impl FnOnce() -> Result<Vec<u8>> + Send + 'static) -> Result<Vec<u8>> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(format!("reading a file did not end: {e}")))?
}

async fn put(agent: &Agent, path: &str, content: &[u8]) -> Result<()> {
    let mut writer = agent.write_file(path, Some(0o644)).await?;
    writer.write(content).await?;
    Ok(writer.finish().await?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |why: String| {
        Error::new(Kind::BootFailed, format!("guests are to get {}, but {why}", path.display()))
            .hint("put the file there, or change the daemon's configuration")
    };
    let meta = std::fs::metadata(path).map_err(|e| failed(format!("it cannot be read: {e}")))?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(failed(format!("it is not a file of at most {} MiB", MAX_FILE >> 20)));
    }
    std::fs::read(path).map_err(|e| failed(format!("it cannot be read: {e}")))
}

fn read_bundle(path: &Path) -> Result<Vec<u8>> {
    let bundle = read(path)?;
    let mark = b"-----BEGIN CERTIFICATE-----";
    if !bundle.windows(mark.len()).any(|window| window == mark) {
        let message = format!("the CA bundle {} has no certificate in PEM", path.display());
        return Err(Error::invalid(message).hint("name a file with -----BEGIN CERTIFICATE----- in it"));
    }
    Ok(bundle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_no_certificate_is_told_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        std::fs::write(&text, "not a certificate").unwrap();
        let absent = dir.path().join("absent");
        for ca_bundle in [&absent, &text, &dir.path().to_owned()] {
            let setup = GuestSetup { ca_bundle: Some(ca_bundle.clone()), ..GuestSetup::default() };
            assert!(setup.check().unwrap_err().hint_text().is_some(), "{}", ca_bundle.display());
        }
        let setup = GuestSetup {
            files: vec![GuestFile { path: "relative".into(), source: text.clone() }],
            ..GuestSetup::default()
        };
        assert_eq!(setup.check().unwrap_err().kind(), Kind::InvalidInput);
        std::fs::write(&text, "-----BEGIN CERTIFICATE-----\n").unwrap();
        GuestSetup { ca_bundle: Some(text), ..GuestSetup::default() }.check().unwrap();
    }

    #[test]
    fn programs_are_told_of_certificates_only_if_there_are_any() {
        let mut setup = GuestSetup { env: [("A".into(), "1".into())].into(), ..GuestSetup::default() };
        assert_eq!(setup.environment().len(), 1);
        setup.ca_bundle = Some("/x".into());
        assert_eq!(setup.environment()["NODE_EXTRA_CA_CERTS"], CA_BUNDLE);
        setup.env.insert("SSL_CERT_FILE".into(), "/mine".into());
        assert_eq!(setup.environment()["SSL_CERT_FILE"], "/mine");
    }
}
