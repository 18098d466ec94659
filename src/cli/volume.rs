//! `miosa volume …`.

use serde_json::json;

use super::args::{VolumeCommand, VolumeSnapshotsCommand};
use super::output::{Out, Result};
use super::sandbox::{self, age};
use crate::api::client::{Client, escape};
use crate::api::types::{
    AttachVolumeBody, AttachmentBody, CreateVolumeBody, DetachVolumeBody, SnapshotVolumeBody, VolumeBody,
    VolumeSnapshotBody,
};
use crate::engine::records::Consistency;
use crate::units::show_bytes;

pub(super) async fn run(client: &Client, out: Out, command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create { name, size, snapshot: snapshot_id, dedup_domain } => {
            let body =
                CreateVolumeBody { name, size_mb: size, snapshot_id, dedup_domain, ..CreateVolumeBody::default() };
            let volume: VolumeBody = client.post("/volumes", &body).await?;
            out.answer(&volume, &volume.id, |out| {
                let next = format!("miosa volume attach {} SANDBOX --mount /data", volume.name);
                format!(
                    "{} {} has {}\n{}",
                    volume.id,
                    out.strong(&volume.name),
                    show_bytes(volume.size_bytes),
                    out.next_step(&next)
                )
            })
        }
        VolumeCommand::List => {
            let volumes: Vec<VolumeBody> = client.get("/volumes").await?;
            let ids: Vec<_> = volumes.iter().map(|v| v.id.as_str()).collect();
            out.answer(&volumes, &ids.join("\n"), |out| table(out, &volumes))
        }
        VolumeCommand::Show(target) => {
            let volume: VolumeBody = client.get(&path(&target.volume, "")).await?;
            out.answer(&volume, &volume.id, |out| show(out, &volume))
        }
        VolumeCommand::Attach { volume, sandbox, mount, read_only } => {
            let body = AttachVolumeBody { volume_id: volume, mount_path: mount, read_only: Some(read_only) };
            let made: AttachmentBody = client.post(&sandbox::path(&sandbox, "/volumes"), &body).await?;
            out.answer(&made, &made.volume_id, |out| {
                let how = if made.read_only { " for reading" } else { "" };
                let next = format!("miosa sandbox resume {sandbox}");
                format!(
                    "{} is attached to {sandbox}{how}; its next session has it at {}\n{}",
                    out.strong(&made.volume_name),
                    made.mount_path,
                    out.next_step(&next)
                )
            })
        }
        VolumeCommand::Detach { volume, sandbox } => {
            let body = DetachVolumeBody { sandbox_id: sandbox };
            let volume: VolumeBody = client.post(&path(&volume, "/detach"), &body).await?;
            out.answer(&volume, &volume.id, |_| format!("{} is detached", volume.name))
        }
        VolumeCommand::Delete(target) => {
            let volume: VolumeBody = client.delete(&path(&target.volume, "")).await?;
            out.answer(&volume, &volume.id, |_| format!("{} {} is deleted", volume.id, volume.name))
        }
        VolumeCommand::Snapshot { target, name } => {
            let made: VolumeSnapshotBody =
                client.post(&path(&target.volume, "/snapshots"), &SnapshotVolumeBody { name }).await?;
            out.answer(&made, &made.id, |out| {
                let next = format!("miosa volume create NAME --snapshot {}", made.id);
                format!("{} {}\n{}", made.id, consistency(made.consistency), out.next_step(&next))
            })
        }
        VolumeCommand::Snapshots(VolumeSnapshotsCommand::List { volume }) => {
            let route = volume.map_or("/volume-snapshots".to_owned(), |volume| path(&volume, "/snapshots"));
            let all: Vec<VolumeSnapshotBody> = client.get(&route).await?;
            let ids: Vec<_> = all.iter().map(|s| s.id.as_str()).collect();
            out.answer(&all, &ids.join("\n"), |out| snapshots(out, &all))
        }
        VolumeCommand::Snapshots(VolumeSnapshotsCommand::Delete { snapshot }) => {
            let gone: VolumeSnapshotBody = client.delete(&format!("/volume-snapshots/{}", escape(&snapshot))).await?;
            out.answer(&gone, &gone.id, |_| format!("{} is deleted", gone.id))
        }
        VolumeCommand::Restore { target, snapshot } => {
            let route = path(&target.volume, &format!("/restore/{}", escape(&snapshot)));
            let volume: VolumeBody = client.post(&route, &json!({})).await?;
            out.answer(&volume, &volume.id, |_| format!("{} {} is as {snapshot} was", volume.id, volume.name))
        }
    }
}

/// The route of a volume, by id or name.
fn path(volume: &str, rest: &str) -> String {
    format!("/volumes/{}{rest}", escape(volume))
}

fn holders(volume: &VolumeBody) -> String {
    let holders = volume
        .attachments
        .iter()
        .map(|at| format!("{}:{}{}", at.sandbox_id, at.mount_path, if at.read_only { " (read-only)" } else { "" }));
    holders.collect::<Vec<_>>().join(", ")
}

fn table(out: &Out, volumes: &[VolumeBody]) -> String {
    if volumes.is_empty() {
        return format!("no volumes\n{}", out.next_step("miosa volume create NAME --size 10gb"));
    }
    let row =
        |v: &VolumeBody| vec![v.id.clone(), v.name.clone(), show_bytes(v.size_bytes), age(v.created_at), holders(v)];
    out.table(&["ID", "NAME", "SIZE", "AGE", "ATTACHED"], &volumes.iter().map(row).collect::<Vec<_>>())
}

fn snapshots(out: &Out, all: &[VolumeSnapshotBody]) -> String {
    if all.is_empty() {
        return format!("no snapshots\n{}", out.next_step("miosa volume snapshot VOLUME --name NAME"));
    }
    let row = |s: &VolumeSnapshotBody| {
        let name = s.name.clone().unwrap_or_default();
        vec![s.id.clone(), name, s.volume_id.clone(), consistency(s.consistency).to_owned(), age(s.created_at)]
    };
    out.table(&["ID", "NAME", "VOLUME", "CONSISTENCY", "AGE"], &all.iter().map(row).collect::<Vec<_>>())
}

fn consistency(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Filesystem => "filesystem",
        Consistency::Crash => "crash",
    }
}

fn show(out: &Out, v: &VolumeBody) -> String {
    let mut fields = vec![
        ("id", v.id.clone()),
        ("name", v.name.clone()),
        ("status", v.status.clone()),
        ("size", show_bytes(v.size_bytes)),
        ("created", v.created_at.to_string()),
    ];
    let mut optional = |key, value: Option<String>| fields.extend(value.map(|v| (key, v)));
    optional("snapshot", v.snapshot_id.clone());
    optional("dedup domain", v.dedup_domain.clone());
    optional("attached", Some(holders(v)).filter(|text| !text.is_empty()));
    optional("data", v.logical_bytes.map(show_bytes));
    optional("referenced", v.referenced_bytes.map(show_bytes));
    optional("exclusive", v.exclusive_bytes.map(show_bytes));
    optional("unsealed", v.unsealed_bytes.map(show_bytes));
    out.fields(&fields)
}
