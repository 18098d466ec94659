//! Container images in an archive: the OCI image layout, and what `docker save` writes.
//!
//! The archive's files are put beside each other under numbers; names are only looked up. Every layer's content is
//! compared with the digest in the image's configuration.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use tar::{Archive, EntryType};

use super::layer::{self, LeftOut};
use super::tree::{Tree, bad_path, broken};
use crate::{Error, ErrorKind, Result};

/// Most files in an image's archive.
const MAX_FILES: usize = 10_000;
/// Largest JSON document of an image.
const MAX_JSON: u64 = 16 << 20;
/// Indexes within indexes.
const MAX_INDEXES: u32 = 4;

/// How an image wants its programs to be run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Environment of every program.
    pub env: BTreeMap<String, String>,
    /// Working directory, if not the root.
    pub workdir: Option<String>,
    /// Who its program wants to be.
    pub user: Option<String>,
    /// Its program.
    pub entrypoint: Vec<String>,
    /// The program's arguments, or the program.
    pub cmd: Vec<String>,
}

/// The first bytes of an archive of this kind are a name like these.
pub(super) fn is_image_name(path: &[u8]) -> bool {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let top = path.split(|b| *b == b'/').next().unwrap_or_default();
    let hex = |text: &[u8]| text.len() == 64 && text.iter().all(u8::is_ascii_hexdigit);
    let stem = top.strip_suffix(b".json").or(top.strip_suffix(b".tar")).unwrap_or(top);
    matches!(top, b"" | b"." | b"blobs" | b"oci-layout" | b"index.json" | b"manifest.json" | b"repositories")
        || hex(stem)
}

/// The files of an archive by name.
pub(super) struct Files {
    dir: PathBuf,
    names: BTreeMap<Vec<u8>, PathBuf>,
    links: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Files {
    /// Unpacks an archive into `dir`, an empty directory, as numbered files of at most `max_bytes` in all.
    pub(super) fn unpack(stream: impl Read, dir: PathBuf, max_bytes: u64) -> Result<Files> {
        let mut files = Files { dir, names: BTreeMap::new(), links: BTreeMap::new() };
        let mut left = max_bytes;
        let mut archive = Archive::new(stream);
        for entry in archive.entries().map_err(|e| broken("at its beginning", &e))? {
            let mut entry = entry.map_err(|e| broken("among its files", &e))?;
            let name = plain_name(&entry.path_bytes());
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    let size = entry.size();
                    left = left.checked_sub(size).ok_or_else(|| {
                        Error::new(
                            ErrorKind::Invalid,
                            "the archive is larger than what an image of this disk's size needs",
                        )
                        .hint("ask for a larger disk: --disk SIZE")
                    })?;
                    if files.names.len() + files.links.len() >= MAX_FILES {
                        return Err(bad_path(&name, "an image has no more than 10000 files"));
                    }
                    let path = files.dir.join(files.names.len().to_string());
                    let mut file = File::create_new(&path).map_err(|e| Error::io(path.display(), e))?;
                    let copied = std::io::copy(&mut entry, &mut file).map_err(|e| broken("among its files", &e))?;
                    if copied != size {
                        return Err(broken("among its files", &"one ends too early"));
                    }
                    files.names.insert(name, path);
                }
                // Layers that several images share are links in what older versions save.
                EntryType::Symlink | EntryType::Link if files.links.len() < MAX_FILES => {
                    let target = entry.link_name_bytes().map(|t| t.into_owned()).unwrap_or_default();
                    let target = match entry.header().entry_type() {
                        EntryType::Symlink => beside(&name, &target),
                        _ => plain_name(&target),
                    };
                    files.links.insert(name, target);
                }
                _ => {}
            }
        }
        Ok(files)
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains_key(name.as_bytes())
    }

    fn find(&self, name: &str) -> Result<&Path> {
        let mut key = name.as_bytes();
        for _ in 0..8 {
            if let Some(path) = self.names.get(key) {
                return Ok(path);
            }
            let Some(target) = self.links.get(key) else { break };
            key = target;
        }
        Err(broken("", &format!("it has no file {:?}", name.chars().take(200).collect::<String>())))
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.find(name)?;
        let failed = |e: std::io::Error| Error::io(path.display(), e);
        let mut text = Vec::new();
        File::open(path).map_err(failed)?.take(MAX_JSON).read_to_end(&mut text).map_err(failed)?;
        if let Some(digest) = name.strip_prefix("blobs/sha256/")
            && hex(&Sha256::digest(&text)) != digest
        {
            return Err(broken(&format!("in {name}"), &"it does not match its digest"));
        }
        serde_json::from_slice(&text).map_err(|e| broken(&format!("in {name}"), &e))
    }

    /// The file of this digest.
    fn blob(digest: &str) -> Result<String> {
        match digest.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(format!("blobs/sha256/{hex}"))
            }
            _ => Err(broken(
                "",
                &format!("{:?} is no digest that is known here", digest.chars().take(100).collect::<String>()),
            )),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Without `./` and repeated slashes, so that names can be compared.
fn plain_name(path: &[u8]) -> Vec<u8> {
    beside(b"", path)
}

/// Where a link of this name leads.
fn beside(name: &[u8], target: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = name.split(|b| *b == b'/').collect();
    parts.pop();
    for part in target.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Configuration {
    architecture: Option<String>,
    os: Option<String>,
    #[serde(default)]
    config: Option<RunConfiguration>,
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfiguration {
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// An image found in an archive.
pub(super) struct Image {
    /// What it is called there, if it is.
    pub(super) reference: Option<String>,
    pub(super) config: ImageConfig,
    /// Files of the layers, lowest first, each with the digest of what is in it.
    layers: Vec<(String, String)>,
}

impl Image {
    /// The one image for this machine in the archive.
    pub(super) fn find(files: &Files) -> Result<Image> {
        let (reference, config, layers) = if files.has("oci-layout") || !files.has("manifest.json") {
            let index: Index = files.json("index.json")?;
            let (reference, manifest) = choose(files, index, 0)?;
            let layers = manifest.layers.iter().map(|l| Files::blob(&l.digest)).collect::<Result<Vec<_>>>()?;
            (reference, Files::blob(&manifest.config.digest)?, layers)
        } else {
            let mut saved: Vec<Saved> = files.json("manifest.json")?;
            let Some(only) = saved.pop() else { return Err(broken("in manifest.json", &"it names no image")) };
            if !saved.is_empty() {
                let names = saved.iter().chain([&only]).flat_map(|s| s.repo_tags.iter().flatten().cloned());
                return Err(several(names));
            }
            (only.repo_tags.and_then(|tags| tags.into_iter().next()), only.config, only.layers)
        };
        let configuration: Configuration = files.json(&config)?;
        let (architecture, os) = (configuration.architecture.as_deref(), configuration.os.as_deref());
        if architecture.is_some_and(|a| a != "amd64") || os.is_some_and(|os| os != "linux") {
            let message = format!("the image is for {}/{}", os.unwrap_or("?"), architecture.unwrap_or("?"));
            return Err(Error::new(ErrorKind::Invalid, message).hint("save the image for linux/amd64"));
        }
        let digests = configuration.rootfs.diff_ids;
        if digests.len() != layers.len() {
            let why = format!("it has {} layers, and digests of {}", layers.len(), digests.len());
            return Err(broken("in its configuration", &why));
        }
        let config = run_config(configuration.config.unwrap_or_default());
        Ok(Image { reference, config, layers: layers.into_iter().zip(digests).collect() })
    }

    /// Applies all layers.
    pub(super) fn apply(
        &self,
        files: &Files,
        tree: &mut Tree,
        left_out: &mut LeftOut,
        progress: &mut dyn FnMut(&str),
    ) -> Result<()> {
        for (number, (name, digest)) in self.layers.iter().enumerate() {
            progress(&format!("layer {} of {}", number + 1, self.layers.len()));
            let mut stream = Hashing { inner: layer::open(files.find(name)?)?, hasher: Sha256::new() };
            layer::apply(tree, &mut stream, true, left_out)?;
            // Archives are padded beyond their end.
            std::io::copy(&mut stream, &mut std::io::sink()).map_err(|e| broken(&format!("in {name}"), &e))?;
            if digest.strip_prefix("sha256:") != Some(hex(&stream.hasher.finalize()).as_str()) {
                return Err(broken(&format!("in {name}"), &"its content is not what the image's configuration says"));
            }
        }
        if let Some(dir) = &self.config.workdir {
            tree.ensure_directory(dir.trim_start_matches('/').as_bytes())?;
        }
        Ok(())
    }
}

fn choose(files: &Files, index: Index, depth: u32) -> Result<(Option<String>, Manifest)> {
    let ours = |d: &Descriptor| {
        d.platform.as_ref().is_none_or(|p| p.architecture == "amd64" && p.os == "linux")
            && !d.annotations.contains_key("vnd.docker.reference.type")
    };
    let total = index.manifests.len();
    let mut fitting: Vec<Descriptor> = index.manifests.into_iter().filter(ours).collect();
    let Some(one) = fitting.pop() else {
        let message = format!("none of the archive's {total} images is for linux/amd64");
        return Err(Error::new(ErrorKind::Invalid, message).hint("save the image for linux/amd64"));
    };
    let reference = |d: &Descriptor| d.annotations.get("org.opencontainers.image.ref.name").cloned();
    if fitting.iter().any(|other| other.digest != one.digest) {
        return Err(several(fitting.iter().chain([&one]).map(|d| reference(d).unwrap_or_else(|| d.digest.clone()))));
    }
    let name = Files::blob(&one.digest)?;
    if one.media_type.contains("index") || one.media_type.contains("manifest.list") {
        if depth >= MAX_INDEXES {
            return Err(broken("in its index", &"indexes lead to indexes"));
        }
        let (inner, manifest) = choose(files, files.json(&name)?, depth + 1)?;
        return Ok((reference(&one).or(inner), manifest));
    }
    Ok((reference(&one), files.json(&name)?))
}

fn several(names: impl Iterator<Item = String>) -> Error {
    let names: Vec<_> = names.take(10).collect();
    Error::new(ErrorKind::Invalid, format!("the archive holds several images: {}", names.join(", ")))
        .hint("save one image alone")
}

fn run_config(run: RunConfiguration) -> ImageConfig {
    let text = |value: Option<String>| value.filter(|v| !v.is_empty() && !v.contains('\0'));
    let pairs = run.env.unwrap_or_default();
    let env = pairs.iter().filter_map(|pair| pair.split_once('=')).filter(|(name, _)| !name.is_empty());
    ImageConfig {
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        workdir: text(run.working_dir).filter(|dir| dir.starts_with('/') && dir != "/"),
        user: text(run.user),
        entrypoint: run.entrypoint.unwrap_or_default(),
        cmd: run.cmd.unwrap_or_default(),
    }
}

/// Hashes what passes.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_are_known() {
        let id = "0123456789abcdef".repeat(4);
        for name in ["oci-layout", "./index.json", "blobs/sha256/x", "manifest.json", &format!("{id}/layer.tar")] {
            assert!(is_image_name(name.as_bytes()), "{name}");
        }
        for name in ["etc/passwd", "./bin", "usr/", "index.html"] {
            assert!(!is_image_name(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn links_between_layers_are_followed() {
        assert_eq!(beside(b"a/layer.tar", b"../b/layer.tar"), b"b/layer.tar");
        assert_eq!(beside(b"a/layer.tar", b"../../../x"), b"x");
        assert_eq!(plain_name(b"./a//b"), b"a/b");
    }

    #[test]
    fn a_run_configuration_is_taken_with_care() {
        let run: RunConfiguration = serde_json::from_str(
            r#"{"Env":["PATH=/a:/b","=x","BAD"],"WorkingDir":"/app","User":"","Entrypoint":null,"Cmd":["sh"]}"#,
        )
        .unwrap();
        let config = run_config(run);
        assert_eq!(config.env, BTreeMap::from([("PATH".into(), "/a:/b".into())]));
        assert_eq!((config.workdir.as_deref(), config.user), (Some("/app"), None));
        assert_eq!(config.cmd, ["sh"]);
    }
}
