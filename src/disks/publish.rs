//! Files of a state as a container image.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::AtomicBool;

use oci_spec::image::{Config, ConfigBuilder};
use vmm::image::ImageConfig;

use super::Disks;
use super::files::Still;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::records::slug;
use crate::ext4::{self, archive, contained, contained_copy};
use crate::oci::{self, Compression, Image, Layer, Settings};

/// What becomes an image, and how it wants to be run.
#[derive(Debug, Clone, Default)]
pub struct PublishRequest {
    /// An absolute path; what is there is at the same path in the image.
    pub path: String,
    /// What the image is called; without a name, as what it is made of.
    pub name: Option<String>,
    /// The program, or its arguments; without one, the image's that the files came from.
    pub cmd: Option<Vec<String>>,
    /// What runs the program.
    pub entrypoint: Option<Vec<String>>,
    /// Environment, over that of the image the files came from.
    pub env: BTreeMap<String, String>,
    /// Ports that it listens on, such as `3000` or `53/udp`.
    pub ports: Vec<String>,
    /// Where the program starts; without one, at the path if that is a directory of its own.
    pub workdir: Option<String>,
    /// Who it runs as.
    pub user: Option<String>,
    /// How layers are compressed.
    pub compression: Compression,
}

impl Disks {
    /// Makes an image of a path in `from`, upon the whole file system of `base` if there is one. Its layers are in files
    /// without names until it is dropped. Fails once `given_up` is set.
    pub fn publish(
        &self,
        from: &Still,
        base: Option<&Still>,
        request: &PublishRequest,
        given_up: &AtomicBool,
    ) -> Result<Image> {
        let path = plain_path(&request.path)?;
        let whole = path == "/";
        if whole && base.is_some() {
            return Err(Error::new(Kind::InvalidInput, "a whole file system needs no base")
                .hint("name a directory to put upon the base: --path /workspace"));
        }
        let fallback = slug(from.name());
        let name = request.name.as_deref().unwrap_or(&fallback);
        let name = oci::parse_name(name).map_err(|why| {
            Error::new(Kind::InvalidInput, format!("{name:?} is no image's name: {why}"))
                .hint("small letters, digits, '.', '_', '-' and '/', then ':' and a tag: web:1.0")
        })?;
        std::fs::create_dir_all(&self.dir).map_err(|e| unkept(&e))?;
        let fs = from.open()?;
        let top = contained(|| fs.lookup(&path, true))?;
        let inherited = match (whole, base) {
            (true, _) => from.image().clone(),
            (false, Some(base)) => base.image().clone(),
            (false, None) => ImageConfig::default(),
        };
        let config = configure(&path, top.kind == ext4::Kind::Directory && !whole, inherited, request)?;
        let mut layers = Vec::new();
        if let Some(base) = base {
            layers.push(self.layer(base, "/", false, request.compression, given_up)?);
        }
        layers.push(self.layer(from, &path, base.is_some(), request.compression, given_up)?);
        let created_at = from.created_at().unwrap_or_else(jiff::Timestamp::now);
        Image::new(layers, Settings { name, created_at, config }).map_err(|e| unkept(&e))
    }

    fn layer(
        &self,
        from: &Still,
        path: &str,
        alone: bool,
        compression: Compression,
        given_up: &AtomicBool,
    ) -> Result<Layer> {
        let fs = from.open()?;
        let note = format!("miosa: {path} of {}", from.name());
        let kept = Layer::keep(&self.dir, compression, &note, given_up, |mut to: &mut dyn Write| {
            contained_copy(|| archive::write_layer(&fs, path, alone, &mut to))
        });
        let (read, layer) = kept.map_err(|e| unkept(&e))?;
        read?;
        Ok(layer)
    }
}

/// Absolute, with single slashes.
fn plain_path(path: &str) -> Result<String> {
    let names: Vec<&str> = path.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
    if !path.starts_with('/') || names.contains(&"..") || path.contains('\0') {
        return Err(Error::new(Kind::InvalidInput, format!("{path:?} is no absolute path, or has '..' in it"))
            .hint("such as /workspace, or / for all there is"));
    }
    Ok(format!("/{}", names.join("/")))
}

fn configure(path: &str, is_directory: bool, inherited: ImageConfig, request: &PublishRequest) -> Result<Config> {
    let mut env = inherited.env;
    env.extend(request.env.clone());
    crate::engine::check_env(&env)?;
    let given = |list: &Option<Vec<String>>, or: Vec<String>| list.clone().unwrap_or(or);
    // As with a container file: another entrypoint makes the arguments of the one before meaningless.
    let cmd = match (&request.cmd, &request.entrypoint) {
        (None, Some(_)) => Vec::new(),
        (cmd, _) => given(cmd, inherited.cmd),
    };
    let entrypoint = given(&request.entrypoint, inherited.entrypoint);
    let words = || cmd.iter().chain(&entrypoint).chain(&request.user).chain(&request.workdir);
    if words().any(|word| word.contains('\0')) {
        return Err(Error::new(Kind::InvalidInput, "a command, user or directory has a NUL in it"));
    }
    let own = is_directory.then(|| path.to_owned());
    let workdir = request.workdir.clone().or(own).or(inherited.workdir);
    if let Some(dir) = workdir.as_ref().filter(|dir| !dir.starts_with('/')) {
        return Err(Error::new(Kind::InvalidInput, format!("the working directory {dir:?} is not absolute"))
            .hint("such as /workspace"));
    }
    let mut ports = request.ports.iter().map(|p| parse_port(p)).collect::<Result<Vec<_>>>()?;
    ports.sort();
    ports.dedup();
    let mut config = ConfigBuilder::default();
    if !env.is_empty() {
        config = config.env(env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>());
    }
    if !ports.is_empty() {
        config = config.exposed_ports(ports);
    }
    if !entrypoint.is_empty() {
        config = config.entrypoint(entrypoint);
    }
    if !cmd.is_empty() {
        config = config.cmd(cmd);
    }
    if let Some(workdir) = workdir {
        config = config.working_dir(workdir);
    }
    if let Some(user) = request.user.clone().or(inherited.user) {
        config = config.user(user);
    }
    config.build().map_err(|e| Error::new(Kind::Internal, format!("the image could not be described: {e}")))
}

/// `3000` is `3000/tcp`.
fn parse_port(text: &str) -> Result<String> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    match (number.parse::<u16>(), protocol) {
        (Ok(number @ 1..), "tcp" | "udp" | "sctp") => Ok(format!("{number}/{protocol}")),
        _ => Err(Error::new(Kind::InvalidInput, format!("{text:?} is no port")).hint("such as 3000 or 53/udp")),
    }
}

fn unkept(error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Error::new(Kind::StorageFull, "there is no room for the image's layers in the state directory")
                .hint("free space on its file system; layers are kept there until the image has been sent")
        }
        _ => Error::new(Kind::Storage, format!("the image could not be made: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_plain() {
        assert_eq!(plain_path("/").unwrap(), "/");
        assert_eq!(plain_path("//workspace/./app/").unwrap(), "/workspace/app");
        for wrong in ["", "workspace", "/a/../b", "/.."] {
            assert!(plain_path(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ports_have_protocols() {
        assert_eq!(parse_port("3000").unwrap(), "3000/tcp");
        assert_eq!(parse_port("53/udp").unwrap(), "53/udp");
        for wrong in ["", "0", "65536", "x", "80/http", "80/"] {
            assert!(parse_port(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_asked_for_goes_before_what_is_inherited() {
        let inherited = ImageConfig {
            env: BTreeMap::from([("A".into(), "1".into()), ("B".into(), "2".into())]),
            workdir: Some("/old".into()),
            user: Some("nobody".into()),
            entrypoint: vec!["/init".into()],
            cmd: vec!["serve".into()],
        };
        let plain = configure("/", false, inherited.clone(), &PublishRequest::default()).unwrap();
        assert_eq!(plain.cmd().as_deref(), Some(&["serve".to_owned()][..]));
        assert_eq!((plain.working_dir().as_deref(), plain.user().as_deref()), (Some("/old"), Some("nobody")));
        let request = PublishRequest {
            env: BTreeMap::from([("B".into(), "3".into())]),
            entrypoint: Some(vec!["/run".into()]),
            ports: vec!["80".into(), "80/tcp".into()],
            ..PublishRequest::default()
        };
        let other = configure("/app", true, inherited, &request).unwrap();
        assert_eq!(other.env().as_deref(), Some(&["A=1".to_owned(), "B=3".to_owned()][..]));
        assert_eq!((other.cmd(), other.working_dir().as_deref()), (&None, Some("/app")));
        assert_eq!(other.exposed_ports().as_deref(), Some(&["80/tcp".to_owned()][..]));
    }
}
