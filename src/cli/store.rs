//! `miosa store …`.

use serde_json::{Value, json};

use super::args::StoreCommand;
use super::backend::{Backend, Place};
use super::output::{Failure, Out, Result};
use super::{disk, report};
use crate::api::client::Client;
use crate::disks::DiskView;
use crate::units::show_bytes;

pub(super) async fn run(place: &Place, out: Out, command: StoreCommand) -> Result<()> {
    if matches!(command, StoreCommand::Repair) {
        return repair(place, out).await;
    }
    let backend = Backend::open(place, false).await?;
    let done = on_store(&backend.client, out, command).await;
    backend.close(done).await
}

async fn on_store(client: &Client, out: Out, command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Stats => {
            let stats: Value = client.get("/store/stats").await?;
            out.answer(&stats, "", |out| numbers(out, &stats))
        }
        StoreCommand::Seal { .. } => {
            out.progress("packing …");
            let report: Value = client.post("/store/seal", &json!({})).await?;
            out.answer(&report, "", |out| format!("{}\n{}", numbers(out, &report), out.next_step("miosa store stats")))
        }
        StoreCommand::Gc { dry_run } => {
            let report: Value = client.post(&format!("/store/gc?dry_run={dry_run}"), &json!({})).await?;
            out.answer(&report, "", |out| {
                let next = if dry_run { "miosa store gc" } else { "miosa store stats" };
                format!("{}\n{}", numbers(out, &report), out.next_step(next))
            })
        }
        StoreCommand::Backup { name } => {
            out.progress("copying …");
            let made: Value = client.post("/store/backups", &json!({ "name": name })).await?;
            let path = made["path"].as_str().unwrap_or_default().to_owned();
            out.answer(&made, &path, |out| {
                let next = format!("copy {path} to another disk; to use it: miosa daemon --state-dir {path}");
                format!("{}\n{next}", numbers(out, &made))
            })
        }
        StoreCommand::Repack => {
            out.progress("packing again …");
            let report: Value = client.post("/store/repack", &json!({})).await?;
            out.answer(&report, "", |out| format!("{}\n{}", numbers(out, &report), out.next_step("miosa store stats")))
        }
        StoreCommand::Check => {
            out.progress("reading everything …");
            let report: Value = client.post("/store/check", &json!({})).await?;
            examined(out, &report, "heal what has a copy: miosa store scrub --heal")
        }
        StoreCommand::Scrub { heal } => {
            out.progress("reading everything …");
            let report: Value = client.post(&format!("/store/scrub?heal={heal}"), &json!({})).await?;
            let hint = if heal {
                "what is left has no copy: delete the disks and snapshots named, or restore them from elsewhere"
            } else {
                "heal what has a copy: miosa store scrub --heal"
            };
            examined(out, &report, hint)
        }
        StoreCommand::Usage => {
            let all: Vec<DiskView> = client.get("/store/usage").await?;
            let ids: Vec<_> = all.iter().map(|d| d.id.as_str()).collect();
            out.answer(&all, &ids.join("\n"), |out| {
                let bytes = |b: Option<u64>| b.map(show_bytes).unwrap_or_default();
                let row = |d: &DiskView| {
                    vec![
                        d.id.clone(),
                        disk::display_name(d),
                        show_bytes(d.logical_bytes),
                        bytes(d.referenced_bytes),
                        bytes(d.exclusive_bytes),
                        bytes(d.unsealed_bytes),
                    ]
                };
                let head = ["ID", "NAME", "DATA", "REFERENCED", "EXCLUSIVE", "UNSEALED"];
                out.table(&head, &all.iter().map(row).collect::<Vec<_>>())
            })
        }
        StoreCommand::Report { svg } => report::run(client, out, svg.as_deref()).await,
        StoreCommand::Repair => Ok(()),
    }
}

/// Prints a report, and fails when it tells of damage.
fn examined(out: Out, report: &Value, hint: &str) -> Result<()> {
    let damage = report["damage"].as_array().map_or(&[][..], Vec::as_slice);
    out.answer(report, "", |out| {
        let list: Vec<_> = damage.iter().filter_map(Value::as_str).map(|d| format!("\n{d}")).collect();
        format!("{}{}", numbers(out, report), list.concat())
    })?;
    let Some(first) = damage.first().and_then(Value::as_str) else { return Ok(()) };
    let message = format!("{} things are damaged, the first: {first}", damage.len());
    Err(Failure::new(4, "storage_damaged", message).hint(hint))
}

async fn repair(place: &Place, out: Out) -> Result<()> {
    let state = &place.state;
    if place.is_named {
        return Err(Failure::user("not_here", "a store is repaired where it is, and not over an endpoint")
            .hint("on that machine, with its daemon stopped: miosa store repair"));
    }
    if Client::new(&state.socket()).is_answered().await.is_ok() {
        return Err(
            Failure::user("store_in_use", format!("a daemon runs on {}", state.root().display())).hint("stop it first")
        );
    }
    let store = state.store();
    if !store.is_dir() {
        return Err(super::backend::no_store(state));
    }
    out.progress("reading packs and log …");
    let done = tokio::task::spawn_blocking(move || storage::Store::repair(&store)).await;
    let report = done
        .map_err(|e| Failure::new(4, "internal_error", format!("the repair did not end: {e}")))?
        .map_err(|e| super::backend::not_opened(state, &e))?;
    let report = serde_json::to_value(report)
        .map_err(|e| Failure::new(4, "internal_error", format!("the report cannot be shown: {e}")))?;
    examined(out, &report, "the rest is in order: miosa store check")
}

/// Whatever numbers there are, sizes as sizes.
fn numbers(out: &Out, value: &Value) -> String {
    let Value::Object(map) = value else { return value.to_string() };
    let fields: Vec<(&str, String)> = map
        .iter()
        .filter(|(_, value)| !value.is_array())
        .map(|(key, value)| {
            if let Some(what) = key.strip_suffix("_unix_seconds") {
                let at = value.as_i64().filter(|at| *at > 0).and_then(|at| jiff::Timestamp::from_second(at).ok());
                return (what, at.map_or("never".to_owned(), |at| at.to_string()));
            }
            let shown = match (key.strip_suffix("_bytes"), value.as_u64(), value.as_f64()) {
                (Some(_), Some(bytes), _) => show_bytes(bytes),
                (None, None, Some(ratio)) => format!("{ratio:.2}"),
                _ => value.to_string(),
            };
            (key.strip_suffix("_bytes").unwrap_or(key), shown)
        })
        .collect();
    out.fields(&fields)
}
