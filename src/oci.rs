//! Container images, written: layers and a configuration as one archive.
//!
//! It is an OCI image layout, with the list beside it from which `docker load` of any age reads the same blobs. A blob's name is
//! the digest of what is in it, so a layer is kept in a file without a name until it is whole. Equal layers and settings
//! give equal images.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::write::GzEncoder;
use oci_spec::distribution::Reference;
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, Config, Descriptor, HistoryBuilder, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder, SCHEMA_VERSION,
    Sha256Digest,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

/// How hard layers are compressed: the middle of what gzip and zstd do.
const GZIP_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;
/// Where containerd, and so a newer Docker, reads an image's whole name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// A piece of a tar archive.
const UNIT: u64 = 512;

/// How layers are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// What everything reads.
    #[default]
    Gzip,
    /// Smaller and quicker; Docker reads it since version 23.
    Zstd,
    /// Not at all.
    None,
}

impl Compression {
    /// The compression of this name.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "gzip" => Some(Self::Gzip),
            "zstd" => Some(Self::Zstd),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

/// Whether `name` is the name of an image, such as `web:1` or `registry.local:5000/team/web`; with `latest` as its tag if
/// it has none.
pub fn parse_name(name: &str) -> Result<Reference, String> {
    let reference = Reference::from_str(name).map_err(|e| e.to_string())?;
    match reference.digest() {
        Some(_) => Err("an image's digest comes from what is in it".to_owned()),
        None => Ok(reference),
    }
}

/// A layer that is whole.
#[derive(Debug)]
pub struct Layer {
    content: File,
    media_type: MediaType,
    digest: Sha256Digest,
    size_bytes: u64,
    /// Of the archive before its compression.
    diff_id: String,
    /// What made it, for people.
    note: String,
}

impl Layer {
    /// Keeps what `write` writes in a file without a name in `dir`. `write` fails once `given_up` is set.
    pub fn keep<T>(
        dir: &Path,
        compression: Compression,
        note: &str,
        given_up: &AtomicBool,
        write: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    ) -> io::Result<(T, Layer)> {
        let file = BufWriter::with_capacity(1 << 18, tempfile::tempfile_in(dir)?);
        let packed = Hashing::new(file, given_up);
        let packer = match compression {
            Compression::Gzip => Packer::Gzip(GzEncoder::new(packed, flate2::Compression::new(GZIP_LEVEL))),
            Compression::Zstd => Packer::Zstd(zstd::Encoder::new(packed, ZSTD_LEVEL)?),
            Compression::None => Packer::None(packed),
        };
        let mut plain = Hashing::new(packer, given_up);
        let done = write(&mut plain)?;
        let (packer, diff_id, _) = plain.finish();
        let (file, digest, size_bytes) = packer.finish()?.finish();
        let layer = Layer {
            content: file.into_inner().map_err(io::IntoInnerError::into_error)?,
            media_type: match compression {
                Compression::Gzip => MediaType::ImageLayerGzip,
                Compression::Zstd => MediaType::ImageLayerZstd,
                Compression::None => MediaType::ImageLayer,
            },
            digest: Sha256Digest::from_str(&digest).map_err(io::Error::other)?,
            size_bytes,
            diff_id: format!("sha256:{diff_id}"),
            note: note.to_owned(),
        };
        Ok((done, layer))
    }
}

/// What is put into an image beside its layers.
#[derive(Debug)]
pub struct Settings {
    /// What the image is called.
    pub name: Reference,
    /// When what is in it was as it is.
    pub created_at: jiff::Timestamp,
    /// How it wants to be run.
    pub config: Config,
}

/// An image that is ready to be written.
#[derive(Debug)]
pub struct Image {
    /// By name within the archive.
    files: Vec<(String, Content)>,
    manifest: Sha256Digest,
    name: Reference,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    File(File, u64),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File(_, len) => *len,
        }
    }
}

impl Image {
    /// Puts layers, lowest first, together.
    pub fn new(layers: Vec<Layer>, settings: Settings) -> io::Result<Image> {
        let failed = |e: oci_spec::OciSpecError| io::Error::other(format!("the image could not be described: {e}"));
        let Settings { name, created_at, config } = settings;
        let created = created_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let history = layers
            .iter()
            .map(|l| HistoryBuilder::default().created(&*created).created_by(&*l.note).build())
            .collect::<Result<Vec<_>, _>>();
        let diff_ids: Vec<String> = layers.iter().map(|l| l.diff_id.clone()).collect();
        let configuration = ImageConfigurationBuilder::default()
            .created(created)
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(config)
            .rootfs(RootFsBuilder::default().diff_ids(diff_ids).build().map_err(failed)?)
            .history(history.map_err(failed)?)
            .build()
            .map_err(failed)?;
        let configuration = configuration.to_string().map_err(failed)?.into_bytes();
        let configuration_digest = sha256(&configuration)?;
        let describe = |l: &Layer| Descriptor::new(l.media_type.clone(), l.size_bytes, l.digest.clone());
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(Descriptor::new(MediaType::ImageConfig, configuration.len() as u64, configuration_digest.clone()))
            .layers(layers.iter().map(describe).collect::<Vec<_>>())
            .build()
            .and_then(|manifest| manifest.to_string())
            .map_err(failed)?
            .into_bytes();
        let manifest_digest = sha256(&manifest)?;
        let tag = name.tag().unwrap_or("latest");
        let mut entry = Descriptor::new(MediaType::ImageManifest, manifest.len() as u64, manifest_digest.clone());
        let platform = PlatformBuilder::default().architecture(Arch::Amd64).os(Os::Linux).build().map_err(failed)?;
        entry.set_platform(Some(platform));
        entry.set_annotations(Some(HashMap::from([
            (ANNOTATION_REF_NAME.to_owned(), tag.to_owned()),
            (CONTAINERD_NAME.to_owned(), name.whole()),
        ])));
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests([entry])
            .build()
            .map_err(failed)?;
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build().map_err(failed)?;
        // What `docker save` wrote before there was a standard, and `docker load` has always read.
        let saved = json!([{
            "Config": blob(&configuration_digest),
            "RepoTags": [familiar(&name)],
            "Layers": layers.iter().map(|l| blob(&l.digest)).collect::<Vec<_>>(),
        }]);
        let mut files = vec![
            ("oci-layout".to_owned(), Content::Bytes(ordered(&layout)?)),
            ("index.json".to_owned(), Content::Bytes(ordered(&index)?)),
            ("manifest.json".to_owned(), Content::Bytes(ordered(&saved)?)),
            (blob(&configuration_digest), Content::Bytes(configuration)),
            (blob(&manifest_digest), Content::Bytes(manifest)),
        ];
        for layer in layers {
            let blob = blob(&layer.digest);
            if files.iter().all(|(name, _)| *name != blob) {
                files.push((blob, Content::File(layer.content, layer.size_bytes)));
            }
        }
        Ok(Image { files, manifest: manifest_digest, name })
    }

    /// The image's digest: that of its manifest.
    pub fn digest(&self) -> String {
        format!("sha256:{}", self.manifest)
    }

    /// What it is called, as Docker shows it.
    pub fn name(&self) -> String {
        familiar(&self.name)
    }

    /// Bytes of the archive.
    pub fn size_bytes(&self) -> u64 {
        let files = self.files.iter().map(|(_, content)| UNIT + content.len().next_multiple_of(UNIT));
        files.sum::<u64>() + 2 * UNIT
    }

    /// Writes the archive.
    pub fn write(self, to: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(to);
        for (name, content) in self.files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(content.len());
            match content {
                Content::Bytes(bytes) => archive.append_data(&mut header, name, &*bytes)?,
                Content::File(mut file, len) => {
                    file.rewind()?;
                    // Tar reads in small pieces.
                    archive.append_data(&mut header, name, io::BufReader::with_capacity(1 << 18, file.take(len)))?;
                }
            }
        }
        archive.into_inner()?.flush()
    }
}

/// `web:1` for what is `docker.io/library/web:1` in full.
fn familiar(name: &Reference) -> String {
    let whole = name.whole();
    let short = whole.strip_prefix("docker.io/").unwrap_or(&whole);
    short.strip_prefix("library/").unwrap_or(short).to_owned()
}

fn blob(digest: &Sha256Digest) -> String {
    format!("blobs/sha256/{digest}")
}

fn sha256(bytes: &[u8]) -> io::Result<Sha256Digest> {
    Sha256Digest::from_str(&hex(&Sha256::digest(bytes))).map_err(io::Error::other)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// As JSON with the names of each object in order, so that equal documents have equal bytes.
fn ordered(document: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut value = serde_json::to_value(document)?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

/// Either compression, or none.
enum Packer<W: Write> {
    Gzip(GzEncoder<W>),
    Zstd(zstd::Encoder<'static, W>),
    None(W),
}

impl<W: Write> Packer<W> {
    fn finish(self) -> io::Result<W> {
        match self {
            Packer::Gzip(encoder) => encoder.finish(),
            Packer::Zstd(encoder) => encoder.finish(),
            Packer::None(to) => Ok(to),
        }
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Packer::Gzip(encoder) => encoder.write(bytes),
            Packer::Zstd(encoder) => encoder.write(bytes),
            Packer::None(to) => to.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Packer::Gzip(encoder) => encoder.flush(),
            Packer::Zstd(encoder) => encoder.flush(),
            Packer::None(to) => to.flush(),
        }
    }
}

/// Hashes and counts what passes.
struct Hashing<'a, W> {
    to: W,
    hasher: Sha256,
    bytes: u64,
    given_up: &'a AtomicBool,
}

impl<'a, W> Hashing<'a, W> {
    fn new(to: W, given_up: &'a AtomicBool) -> Self {
        Self { to, hasher: Sha256::new(), bytes: 0, given_up }
    }

    fn finish(self) -> (W, String, u64) {
        (self.to, hex(&self.hasher.finalize()), self.bytes)
    }
}

impl<W: Write> Write for Hashing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody waits for it any more"));
        }
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(compression: Compression) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let make = |text: &'static [u8]| {
            let keep = Layer::keep(dir.path(), compression, "test", &AtomicBool::new(false), |to| to.write_all(text));
            keep.unwrap().1
        };
        let layers = vec![make(b"one layer"), make(b"another"), make(b"one layer")];
        let settings = Settings {
            name: parse_name("web:1").unwrap(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            config: Config::default(),
        };
        let image = Image::new(layers, settings).unwrap();
        let (size, mut bytes) = (image.size_bytes(), Vec::new());
        assert_eq!(image.name(), "web:1");
        image.write(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, size);
        bytes
    }

    #[test]
    fn equal_images_have_equal_bytes_and_equal_layers_are_there_once() {
        for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
            let bytes = image(compression);
            assert_eq!(bytes, image(compression), "{compression:?}");
            let mut archive = tar::Archive::new(&*bytes);
            let names: Vec<_> =
                archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
            assert_eq!(names.len(), 3 + 2 + 2, "{names:?}");
        }
    }

    #[test]
    fn names_are_dockers() {
        for (name, shown) in [
            ("web", "web:latest"),
            ("web:1.0", "web:1.0"),
            ("team/web:x", "team/web:x"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ] {
            assert_eq!(familiar(&parse_name(name).unwrap()), shown);
        }
        for wrong in ["", "Web", "web:", "web:a b", "a//b", &format!("web@sha256:{}", "0".repeat(64))] {
            assert!(parse_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_nobody_waits_for_is_not_finished() {
        let dir = tempfile::tempdir().unwrap();
        let done = Layer::keep(dir.path(), Compression::Gzip, "", &AtomicBool::new(true), |to| to.write_all(b"x"));
        assert_eq!(done.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
