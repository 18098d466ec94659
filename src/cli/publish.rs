//! `miosa sandbox publish`: a sandbox's files as a container image, in a file or in the local Docker.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Seek};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Map, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStdin, Command};

use super::args::PublishArgs;
use super::contents::copy;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use super::save;
use crate::api::client::{Client, Download, Error, IMAGE_DIGEST, IMAGE_NAME, escape};
use crate::api::contents::PublishBody;
use crate::units::show_bytes;

/// What loads an image, beside its arguments.
const DOCKER: &str = "docker";

pub(super) async fn run(client: &Client, out: Out, args: PublishArgs) -> Result<()> {
    let PublishArgs { key, output, docker, .. } = &args;
    let to_stdout = output.as_deref() == Some(Path::new("-"));
    if to_stdout && (out.json || *docker || std::io::stdout().is_terminal()) {
        return Err(Failure::user("usage", "stdout is wanted for the image").hint("name a file, or pipe it on"));
    }
    if *docker && !is_installed(DOCKER) {
        return Err(Failure::user("docker_missing", "there is no docker on this machine's PATH")
            .hint("write a file instead (--output FILE), and load it where Docker is: docker load -i FILE"));
    }
    out.progress("reading the files, and packing them …");
    let mut download = begin(client, key, &args).await?;
    let header = |name| download.header(name).unwrap_or_default().to_owned();
    let (name, digest) = (header(IMAGE_NAME), header(IMAGE_DIGEST));
    if to_stdout {
        return copy(&mut download, &mut std::io::stdout().lock(), Path::new("-")).await.map(drop);
    }
    let bytes = match (output, docker) {
        (Some(file), false) => save::beside(file, async |to: &mut File| copy(&mut download, to, file).await).await?,
        (Some(file), true) => {
            let bytes = save::beside(file, async |to: &mut File| copy(&mut download, to, file).await).await?;
            let mut saved = File::open(file).map_err(|e| save::unwritable(file, e))?;
            saved.rewind().map_err(|e| save::unwritable(file, e))?;
            load(out, Stdio::from(saved), None).await?;
            bytes
        }
        (None, _) => load(out, Stdio::piped(), Some(&mut download)).await?,
    };
    let answer = json!({ "image": name, "digest": digest, "archive_bytes": bytes, "file": output, "docker": docker });
    out.answer(&answer, &name, |out| {
        let text = format!("{} {digest}, {}", out.strong(&name), show_bytes(bytes));
        let next = match (output, docker) {
            (_, true) => format!("docker run --rm {name}"),
            (Some(file), _) => format!("docker load -i {0}, or: skopeo copy oci-archive:{0} …", file.display()),
            (None, false) => return text,
        };
        format!("{text}\n{}", out.next_step(&next))
    })
}

/// Asks for the image of a sandbox, or of a snapshot if there is no sandbox of that name.
async fn begin(client: &Client, key: &str, args: &PublishArgs) -> Result<Download> {
    let body = PublishBody {
        path: Some(args.path.clone()),
        tag: args.tag.clone(),
        base: args.base.clone(),
        cmd: args.cmd.clone(),
        entrypoint: args.entrypoint.clone(),
        env: args.env.iter().cloned().collect(),
        ports: args.port.clone(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        compression: args.compression,
        other: Map::new(),
    };
    match client.post_download(&path(key, "/publish"), &body).await {
        Err(Error::Refused { status, body: why }) if why.code == "sandbox_not_found" => {
            let snapshot = client.post_download(&format!("/snapshots/{}/publish", escape(key)), &body).await;
            Ok(snapshot.map_err(|error| match error {
                Error::Refused { body, .. } if body.code == "disk_not_found" => Error::Refused { status, body: why },
                error => error,
            })?)
        }
        begun => Ok(begun?),
    }
}

/// Lets Docker read an image from `stdin`, or from a body that is piped to it; says how long that was.
async fn load(out: Out, stdin: Stdio, piped: Option<&mut Download>) -> Result<u64> {
    out.progress("loading it into Docker …");
    let mut command = Command::new(DOCKER);
    command.arg("load").stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| failed(&e.to_string()))?;
    let (stdin, mut stderr) = (child.stdin.take(), child.stderr.take());
    let feeding = async {
        match (piped, stdin) {
            (Some(download), Some(stdin)) => feed(stdin, download).await,
            _ => Ok(0),
        }
    };
    let listening = async {
        let mut told = Vec::new();
        if let Some(stderr) = &mut stderr {
            let _ = stderr.read_to_end(&mut told).await;
        }
        String::from_utf8_lossy(&told).trim().to_owned()
    };
    let (fed, told) = tokio::join!(feeding, listening);
    let status = child.wait().await.map_err(|e| failed(&e.to_string()))?;
    // One that ends early has said why.
    match (status.success(), fed) {
        (true, fed) => fed,
        (false, Err(error)) if told.is_empty() => Err(error),
        (false, _) => Err(failed(&told)),
    }
}

async fn feed(mut stdin: ChildStdin, download: &mut Download) -> Result<u64> {
    let mut bytes = 0;
    while let Some(piece) = download.next_piece().await? {
        match stdin.write_all(&piece).await {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Err(failed("it ended before it had read the image")),
            written => written.map_err(|e| failed(&e.to_string()))?,
        }
        bytes += piece.len() as u64;
    }
    stdin.shutdown().await.map_err(|e| failed(&e.to_string()))?;
    Ok(bytes)
}

fn failed(why: &str) -> Failure {
    Failure::user("docker_failed", format!("docker load failed: {why}"))
        .hint("see whether Docker runs (docker info), or write a file instead: --output FILE")
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .any(|dir| nix::unistd::access(&dir.join(program), nix::unistd::AccessFlags::X_OK).is_ok())
}
