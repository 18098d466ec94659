//! `miosa disk …`.

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{DiskCommand, DiskFrontendArg, ExportFormat, FileDiffArgs};
use super::backend::{Backend, Place};
use super::output::{Failure, Out, Result};
use super::{archives, contents, images};
use crate::api::client::{Client, escape};
use crate::api::disks::{AttachDiskBody, CreateDiskBody, ForkDiskBody, SnapshotDiskBody};
use crate::disks::{Attachment, Difference, DiskKind, DiskView, Frontend};
use crate::units::show_bytes;

/// Ranges of a difference that people are shown.
const MAX_RANGES: usize = 50;
/// What makes a first disk.
const HOW_TO_BEGIN: &str = "miosa disk create NAME --size 10gb";

pub(super) async fn run(place: &Place, out: Out, command: DiskCommand) -> Result<()> {
    let makes = matches!(command, DiskCommand::Create { .. } | DiskCommand::Import(_));
    let command = match command {
        // Before a store is opened, or made: what is wrong with the file is found without it.
        DiskCommand::Import(args) => {
            let image = images::Image::open(&args, out).await?;
            let backend = Backend::open(place, makes).await?;
            let done = match image.archive(args.format)? {
                Some(archive) => archives::import_disks(&backend.client, out, &args, archive).await,
                None => images::import(&backend.client, out, &args, image).await,
            };
            return backend.close(done).await;
        }
        command => command,
    };
    let backend = Backend::open(place, makes).await?;
    let done = on_disks(&backend, out, command).await;
    backend.close(done).await
}

async fn on_disks(backend: &Backend, out: Out, command: DiskCommand) -> Result<()> {
    let client = &backend.client;
    match command {
        DiskCommand::Create { name, size, dedup_domain } => {
            let body = CreateDiskBody { name, size_bytes: size << 20, dedup_domain };
            let disk: DiskView = client.post("/disks", &body).await?;
            made(out, &disk, &format!("miosa disk attach {} --frontend vhost-user", disk.id))
        }
        DiskCommand::Import(_) => Ok(()),
        DiskCommand::Export { disk, file, format: ExportFormat::Archive } => {
            archives::export_disk(client, out, &disk, &file).await
        }
        DiskCommand::Export { disk, file, format: ExportFormat::Raw } => {
            images::export(client, out, &disk, &file).await
        }
        DiskCommand::List => list(client, out, "/disks", HOW_TO_BEGIN).await,
        DiskCommand::Snapshots { disk } => {
            let next = format!("miosa disk snapshot {disk} --name NAME");
            list(client, out, &path(&disk, "/snapshots"), &next).await
        }
        DiskCommand::Show(target) => {
            let disk: DiskView = client.get(&path(&target.disk, "")).await?;
            out.answer(&disk, &disk.id, |out| show(out, &disk))
        }
        DiskCommand::Snapshot { disk, name } => {
            let made_of: DiskView = client.post(&path(&disk, "/snapshots"), &SnapshotDiskBody { name }).await?;
            made(out, &made_of, &format!("miosa disk fork {} --name NAME", made_of.id))
        }
        DiskCommand::Fork { disk, name, count } => fork(client, out, &disk, ForkDiskBody { name, count }).await,
        DiskCommand::Delete(target) => {
            let disk: DiskView = client.delete(&path(&target.disk, "")).await?;
            out.answer(&disk, &disk.id, |out| {
                format!("{} {} is deleted\n{}", disk.id, disk.name, out.next_step("miosa store gc"))
            })
        }
        DiskCommand::Diff { a, b, files: true } => contents::diff(client, out, FileDiffArgs { a, b }).await,
        DiskCommand::Ls(args) => match &args.key {
            Some(key) => contents::ls(client, out, key, &args).await,
            None => list(client, out, "/disks", HOW_TO_BEGIN).await,
        },
        DiskCommand::Cat(args) => contents::cat(client, out, args).await,
        DiskCommand::Extract(args) => contents::extract(client, out, args).await,
        DiskCommand::Diff { a, b, files: false } => {
            let difference: Difference = client.get(&path(&a, &format!("/diff?with={}", escape(&b)))).await?;
            out.answer(&difference, "", |out| differs(out, &difference))
        }
        DiskCommand::Attach { disk, frontend } => attach(backend, out, &disk, frontend).await,
        DiskCommand::Detach(target) => {
            let was: Attachment = client.post(&path(&target.disk, "/detach"), &json!({})).await?;
            out.answer(&was, &target.disk, |_| format!("{} is detached", target.disk))
        }
    }
}

/// The route of a disk or snapshot, by id or name.
pub(super) fn path(disk: &str, rest: &str) -> String {
    format!("/disks/{}{rest}", escape(disk))
}

/// What was made, and what to do next.
pub(super) fn made(out: Out, disk: &DiskView, next: &str) -> Result<()> {
    out.answer(disk, &disk.id, |out| {
        format!("{} {} has {}\n{}", disk.id, out.strong(&disk.name), show_bytes(disk.size_bytes), out.next_step(next))
    })
}

async fn list(client: &Client, out: Out, route: &str, how_to_begin: &str) -> Result<()> {
    let disks: Vec<DiskView> = client.get(route).await?;
    let ids: Vec<_> = disks.iter().map(|d| d.id.as_str()).collect();
    out.answer(&disks, &ids.join("\n"), |out| match disks.is_empty() {
        true => format!("none\n{}", out.next_step(how_to_begin)),
        false => table(out, &disks),
    })
}

fn table(out: &Out, disks: &[DiskView]) -> String {
    let row = |d: &DiskView| {
        let state = match &d.attachment {
            Some(attachment) => format!("attached at {}", attachment.path.display()),
            None => d.state.clone(),
        };
        vec![
            d.id.clone(),
            d.name.clone(),
            show_bytes(d.size_bytes),
            show_bytes(d.logical_bytes),
            d.parent.clone().unwrap_or_default(),
            d.owner.as_ref().map(|o| o.describe()).unwrap_or_default(),
            state,
        ]
    };
    let head = ["ID", "NAME", "SIZE", "DATA", "PARENT", "OWNER", "STATE"];
    out.table(&head, &disks.iter().map(row).collect::<Vec<_>>())
}

/// The name that people know it by.
pub(super) fn display_name(disk: &DiskView) -> String {
    disk.owner.as_ref().map_or_else(|| disk.name.clone(), |o| o.describe())
}

fn show(out: &Out, d: &DiskView) -> String {
    let kind = match d.kind {
        DiskKind::Disk => "disk",
        DiskKind::Snapshot => "snapshot",
    };
    let mut fields = vec![
        ("id", d.id.clone()),
        ("name", d.name.clone()),
        ("kind", kind.to_owned()),
        ("state", d.state.clone()),
        ("size", show_bytes(d.size_bytes)),
        ("data", show_bytes(d.logical_bytes)),
        ("created", d.created_at.to_string()),
    ];
    let mut optional = |key, value: Option<String>| fields.extend(value.map(|v| (key, v)));
    optional("referenced", d.referenced_bytes.map(show_bytes));
    optional("exclusive", d.exclusive_bytes.map(show_bytes));
    optional("unsealed", d.unsealed_bytes.map(show_bytes));
    optional("parent", d.parent.clone());
    optional("dedup domain", d.dedup_domain.clone());
    optional("owner", d.owner.as_ref().map(|o| o.describe()));
    optional("attached", d.attachment.as_ref().map(|a| a.path.display().to_string()));
    out.fields(&fields)
}

async fn fork(client: &Client, out: Out, disk: &str, body: ForkDiskBody) -> Result<()> {
    let next = |d: &DiskView| format!("miosa disk attach {} --frontend vhost-user", d.id);
    if body.count.is_none() {
        let child: DiskView = client.post(&path(disk, "/fork"), &body).await?;
        return made(out, &child, &next(&child));
    }
    let children: Vec<DiskView> = client.post(&path(disk, "/fork"), &body).await?;
    let ids: Vec<_> = children.iter().map(|d| d.id.as_str()).collect();
    out.answer(&children, &ids.join("\n"), |out| table(out, &children))
}

fn differs(out: &Out, d: &Difference) -> String {
    if d.ranges.is_empty() {
        return format!("{} and {} do not differ", d.a, d.b);
    }
    let rows: Vec<_> =
        d.ranges.iter().take(MAX_RANGES).map(|r| vec![r.offset.to_string(), show_bytes(r.bytes)]).collect();
    let more = match d.ranges.len() - rows.len() {
        0 => String::new(),
        more => format!("\n{more} more ranges; all of them: --json"),
    };
    let table = out.table(&["OFFSET", "LENGTH"], &rows);
    format!("{table}{more}\n{} in {} ranges", show_bytes(d.changed_bytes), d.ranges.len())
}

/// With a daemon it serves; without, this process does until it is told to end.
async fn attach(backend: &Backend, out: Out, disk: &str, frontend: DiskFrontendArg) -> Result<()> {
    let frontend = match frontend {
        DiskFrontendArg::VhostUser => Frontend::VhostUser,
        DiskFrontendArg::Fuse => Frontend::Fuse,
    };
    let failed = |e: std::io::Error| Failure::new(4, "internal_error", format!("signals cannot be waited for: {e}"));
    // Listened to before anything is shown, so that an early end is an orderly one, too.
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let shown: Attachment = backend.client.post(&path(disk, "/attach"), &AttachDiskBody { frontend }).await?;
    let place = shown.path.display().to_string();
    out.answer(&shown, &place, |out| match backend.is_own() {
        true => place.clone(),
        false => format!("{place}\n{}", out.next_step(&format!("miosa disk detach {disk}"))),
    })?;
    if backend.is_own() {
        out.progress("serving until interrupted (Ctrl-C)");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // An end without durability would be told here.
        let _: Attachment = backend.client.post(&path(disk, "/detach"), &json!({})).await?;
    }
    Ok(())
}
