//! `miosa sandbox …`, but for exec and files.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{CreateArgs, ForkArgs, SandboxCommand, SnapshotArgs, SnapshotTarget, SnapshotsCommand, WaitArgs};
use super::output::{Failure, Out, Result};
use super::{archives, commands, contents, exec, files, logs, ports, previews, terminal, transfer};
use crate::api::client::{Client, escape};
use crate::api::types::{
    CreateBody, ExtendBody, ForkBody, Kept, MetricsBody, PortStateBody, SandboxBody, SnapshotBody, SnapshotRequestBody,
    StopBody,
};
use crate::engine::lifecycle::State;
use crate::engine::records::Consistency;
use crate::units::{show_bytes, show_duration};

pub(super) async fn run(client: &Client, out: Out, command: SandboxCommand) -> Result<ExitCode> {
    match command {
        SandboxCommand::Create(args) => create(client, out, args).await?,
        SandboxCommand::List { state, tag } => list(client, out, state, &tag).await?,
        SandboxCommand::Show(target) => {
            let sandbox: SandboxBody = client.get(&path(&target.sandbox, "")).await?;
            out.answer(&sandbox, &sandbox.id, |out| show(out, &sandbox))?;
        }
        SandboxCommand::WriteFile(args) => files::write(client, out, args).await?,
        SandboxCommand::ReadFile(args) => files::read(client, out, args).await?,
        SandboxCommand::Cp(args) => transfer::cp(client, out, args).await?,
        SandboxCommand::Upload(args) => transfer::upload(client, out, args).await?,
        SandboxCommand::UploadDir(args) => transfer::upload_dir(client, out, args).await?,
        SandboxCommand::Download(args) => transfer::download(client, out, args).await?,
        SandboxCommand::Wait(args) => wait(client, out, args).await?,
        SandboxCommand::Logs(args) => logs::run(client, out, args).await?,
        SandboxCommand::Exec(args) => return exec::run(client, out, args).await,
        SandboxCommand::Shell(args) => return terminal::shell(client, args).await,
        SandboxCommand::PortForward(args) => return ports::forward(client, out, args).await,
        SandboxCommand::Preview(args) => previews::run(client, out, args).await?,
        SandboxCommand::Command(command) => commands::run(client, out, command).await?,
        SandboxCommand::Stop(args) => {
            out.progress(if args.memory { "stopping, and keeping what runs …" } else { "stopping …" });
            let body = StopBody { memory: args.memory.then_some(true), ..StopBody::default() };
            let sandbox: SandboxBody = client.post(&path(&args.target.sandbox, "/stop"), &body).await?;
            out.answer(&sandbox, &sandbox.id, |out| {
                let next = match sandbox.state {
                    State::Destroyed => "miosa sandbox list".to_owned(),
                    _ => format!("miosa sandbox resume {}", sandbox.id),
                };
                changed(out, &sandbox, &next)
            })?;
        }
        SandboxCommand::Resume(args) => {
            out.progress("starting …");
            let body = if args.without_memory { json!({ "memory": false }) } else { json!({}) };
            let sandbox: SandboxBody = client.post(&path(&args.target.sandbox, "/resume"), &body).await?;
            out.answer(&sandbox, &sandbox.id, |out| {
                changed(out, &sandbox, &format!("miosa sandbox exec {} -- COMMAND", sandbox.id))
            })?;
        }
        SandboxCommand::Snapshot(args) => snapshot(client, out, args).await?,
        SandboxCommand::Snapshots(command) => snapshots(client, out, command).await?,
        SandboxCommand::Restore { target, snapshot } => {
            out.progress("putting the file system back …");
            let route = path(&target.sandbox, &format!("/restore/{}", escape(&snapshot)));
            let sandbox: SandboxBody = client.post(&route, &json!({})).await?;
            out.answer(&sandbox, &sandbox.id, |out| {
                changed(out, &sandbox, &format!("miosa sandbox exec {} -- COMMAND", sandbox.id))
            })?;
        }
        SandboxCommand::Fork(args) => fork(client, out, args).await?,
        SandboxCommand::Usage { target, period } => {
            super::usage::run(client, out, Some(&target.sandbox), &period).await?;
        }
        SandboxCommand::Metrics(target) => {
            let metrics: MetricsBody = client.get(&path(&target.sandbox, "/metrics")).await?;
            out.answer(&metrics, &metrics.sandbox_id, |out| load(out, &metrics))?;
        }
        SandboxCommand::Publish(args) => super::publish::run(client, out, args).await?,
        SandboxCommand::Destroy(target) => {
            let sandbox: SandboxBody = client.delete(&path(&target.sandbox, "")).await?;
            out.answer(&sandbox, &sandbox.id, |out| changed(out, &sandbox, "miosa sandbox list"))?;
        }
        SandboxCommand::Extend { target, timeout } => {
            let body = ExtendBody { timeout_sec: None, timeout_ms: timeout.map(millis) };
            let sandbox: SandboxBody = client.post(&path(&target.sandbox, "/extend"), &body).await?;
            out.answer(&sandbox, &sandbox.id, |_| {
                let left = sandbox.timeout_remaining_ms.map_or("no limit".to_owned(), |ms| show_duration(from_ms(ms)));
                format!("{} has {left} left", sandbox.name)
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The route of a sandbox, by id or name.
pub(super) fn path(sandbox: &str, rest: &str) -> String {
    format!("/sandboxes/{}{rest}", escape(sandbox))
}

pub(super) fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn from_ms(ms: u64) -> Duration {
    // People do not want the milliseconds of minutes.
    if ms >= 1_000 { Duration::from_secs(ms / 1_000) } else { Duration::from_millis(ms) }
}

async fn create(client: &Client, out: Out, args: CreateArgs) -> Result<()> {
    let body = CreateBody {
        template_id: args.template,
        snapshot_id: args.snapshot,
        name: args.name,
        size: args.size,
        cpu_count: args.cpu,
        memory_mb: args.memory,
        disk_size_mb: args.disk,
        timeout_sec: None,
        timeout_ms: args.timeout.map(millis),
        idle_timeout_sec: None,
        idle_timeout_ms: args.idle_timeout.map(millis),
        always_on: None,
        persistent: Some(!args.non_persistent),
        env: Some(args.env.into_iter().collect()).filter(|e: &std::collections::BTreeMap<_, _>| !e.is_empty()),
        network_policy: args.network_policy,
        dedup_domain: args.dedup_domain,
        metadata: None,
        tags: Some(args.tag).filter(|t| !t.is_empty()),
        volumes: Some(args.volume).filter(|volumes| !volumes.is_empty()),
        publish_ports: Some(args.publish_port).filter(|ports| !ports.is_empty()),
        memory: args.without_memory.then_some(false),
        auto_start: args.no_start.then_some(false),
        other: serde_json::Map::new(),
    };
    if args.wait {
        out.progress("creating, and waiting until it can be used …");
    }
    let sandbox: SandboxBody = client.post(&format!("/sandboxes?wait={}", args.wait), &body).await?;
    out.answer(&sandbox, &sandbox.id, |out| {
        changed(out, &sandbox, &format!("miosa sandbox exec {} -- COMMAND", sandbox.id))
    })
}

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);

async fn wait(client: &Client, out: Out, args: WaitArgs) -> Result<()> {
    let until = std::time::Instant::now() + args.timeout;
    let mut told = false;
    loop {
        let sandbox: SandboxBody = client.get(&path(&args.target.sandbox, "")).await?;
        let ended = matches!(sandbox.state, State::Paused | State::Error | State::Destroyed);
        if ended {
            let why = sandbox.last_error.as_deref().map(|e| format!(": {e}")).unwrap_or_default();
            let message = format!("sandbox {} is {}{why}", sandbox.name, sandbox.state.name());
            return Err(Failure::user("sandbox_not_running", message)
                .hint(format!("start a session: miosa sandbox resume {}", sandbox.id)));
        }
        let ready = sandbox.state == State::Running
            && match args.port {
                None => true,
                Some(port) => listens(client, &args.target.sandbox, port).await?,
            };
        if ready {
            return out.answer(&sandbox, &sandbox.id, |out| {
                changed(out, &sandbox, &format!("miosa sandbox exec {} -- COMMAND", sandbox.id))
            });
        }
        if std::time::Instant::now() >= until {
            let what = args.port.map_or("it cannot be used".to_owned(), |p| format!("nothing listens on port {p}"));
            let message = format!("after {} {what}", show_duration(args.timeout));
            return Err(Failure::user("wait_timeout", message).hint("wait longer: --timeout DURATION"));
        }
        if !std::mem::replace(&mut told, true) {
            out.progress("waiting …");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether something listens on a port of the guest's loopback.
async fn listens(client: &Client, sandbox: &str, port: u16) -> Result<bool> {
    let state: PortStateBody = client.get(&path(sandbox, &format!("/ports/{port}"))).await?;
    Ok(state.listening)
}

async fn list(client: &Client, out: Out, state: Option<String>, tags: &[String]) -> Result<()> {
    let query = [("state", state.unwrap_or_default()), ("tags", tags.join(","))];
    let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
    let sandboxes: Vec<SandboxBody> = client.get(&format!("/sandboxes?{}", query.join("&"))).await?;
    let ids: Vec<_> = sandboxes.iter().map(|s| s.id.as_str()).collect();
    out.answer(&sandboxes, &ids.join("\n"), |out| {
        if sandboxes.is_empty() {
            return format!(
                "no sandboxes\n{}",
                out.next_step("miosa sandbox create --template base --name NAME --wait")
            );
        }
        let rows: Vec<_> = sandboxes
            .iter()
            .map(|s| {
                vec![
                    s.id.clone(),
                    s.name.clone(),
                    s.state.name().to_owned(),
                    s.template_id.clone().unwrap_or_default(),
                    if s.persistent { "yes" } else { "no" }.to_owned(),
                    s.timeout_remaining_ms.map(|ms| show_duration(from_ms(ms))).unwrap_or_default(),
                    age(s.created_at),
                ]
            })
            .collect();
        out.table(&["ID", "NAME", "STATE", "TEMPLATE", "PERSISTENT", "TIME LEFT", "AGE"], &rows)
    })
}

pub(super) fn age(since: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().as_second().saturating_sub(since.as_second()).max(0);
    show_duration(Duration::from_secs(seconds as u64).max(Duration::from_secs(1)))
}

/// What the guest does not tell is left out.
fn load(out: &Out, m: &MetricsBody) -> String {
    let mut fields = vec![("state", m.state.name().to_owned()), ("processors", m.cpu.count.to_string())];
    let mut known = |name, value: Option<String>| fields.extend(value.map(|value| (name, value)));
    let pair = |one: Option<u64>, what: &str, other: Option<u64>, also: &str| {
        Some(format!("{} {what}, {} {also}", show_bytes(one?), show_bytes(other?)))
    };
    known("up for", m.uptime_sec.map(|s| show_duration(Duration::from_secs(s.max(1)))));
    known("busy for", m.cpu.busy_ms.map(|ms| show_duration(from_ms(ms))));
    known("load", m.cpu.load_1m.map(|load| format!("{load:.2}")));
    known("memory", pair(m.memory.used_bytes, "used", m.memory.total_bytes, "in all"));
    known("disk", pair(m.disk.read_bytes, "read", m.disk.written_bytes, "written"));
    known("network", pair(m.network.received_bytes, "received", m.network.sent_bytes, "sent"));
    out.fields(&fields)
}

fn show(out: &Out, s: &SandboxBody) -> String {
    let mut fields = vec![
        ("id", s.id.clone()),
        ("name", s.name.clone()),
        ("state", s.state.name().to_owned()),
        ("template", s.template_id.clone().unwrap_or_default()),
        ("size", format!("{} cpu, {} MiB memory, {} disk", s.cpu_count, s.memory_mb, show_bytes(s.disk_size_mb << 20))),
        ("persistent", if s.persistent { "yes" } else { "no" }.to_owned()),
        ("timeout", s.timeout_sec.map_or("no limit".to_owned(), |t| show_duration(Duration::from_secs(t)))),
        ("idle timeout", s.idle_timeout_sec.map_or("no limit".to_owned(), |t| show_duration(Duration::from_secs(t)))),
        ("network", s.network_policy.name().to_owned()),
        ("created", s.created_at.to_string()),
    ];
    let mut optional = |key, value: Option<String>| fields.extend(value.map(|v| (key, v)));
    optional("time left", s.timeout_remaining_ms.map(|ms| show_duration(from_ms(ms))));
    optional("from snapshot", s.snapshot_id.clone());
    optional("forked from", s.forked_from.clone());
    optional("dedup domain", s.dedup_domain.clone());
    optional("preview", s.preview_url.clone());
    optional("started", s.started_at.map(|t| t.to_string()));
    let boot_path = s.boot_path.as_deref().unwrap_or_default();
    optional("boot", s.boot_ms.map(|ms| format!("{boot_path}, {ms} ms")));
    optional("kept", s.kept.map(|kept| kept.name().to_owned()));
    optional("destroyed", s.destroyed_at.map(|t| t.to_string()));
    optional("last error", s.last_error.clone());
    out.fields(&fields)
}

/// What became of a sandbox, and what to do next.
fn changed(out: &Out, s: &SandboxBody, next: &str) -> String {
    let mut text = format!("{} {} is {}", s.id, out.strong(&s.name), s.state.name());
    if let (State::Running, Some(ms)) = (s.state, s.boot_ms) {
        let how = match s.boot_path.as_deref() {
            Some("warm") => "up",
            Some("memory") => "went on",
            _ => "booted",
        };
        text.push_str(&format!(" ({how} in {ms} ms)"));
    }
    if s.kept == Some(Kept::Memory) {
        text.push_str(", and what ran is kept");
    }
    if let Some(error) = &s.last_error {
        text.push_str(&format!("\nnote: {error}"));
    }
    format!("{text}\n{}", out.next_step(next))
}

async fn snapshot(client: &Client, out: Out, args: SnapshotArgs) -> Result<()> {
    let body = SnapshotRequestBody {
        comment: args.name,
        memory: args.memory.then_some(true),
        stop: args.stop.then_some(true),
        // Whole seconds, and never none of them: zero would mean for ever.
        expiration_sec: args.expiration.map(|t| t.as_millis().div_ceil(1_000) as u64),
        keep_last_snapshots: args.keep_last_snapshots,
        other: serde_json::Map::new(),
    };
    if args.stop {
        out.progress("saving, then stopping …");
    }
    let snapshot: SnapshotBody = client.post(&path(&args.target.sandbox, "/snapshots"), &body).await?;
    out.answer(&snapshot, &snapshot.id, |out| {
        let mut text = format!("{} {}", snapshot.id, out.strong(snapshot.comment.as_deref().unwrap_or("(unnamed)")));
        if snapshot.kept == Kept::Memory {
            text.push_str(", with what ran");
        } else if args.memory {
            text.push_str("\nnote: nothing ran, so there are the files only");
        } else if snapshot.consistency == Consistency::Crash {
            text.push_str("\nnote: the guest was not frozen; the state is as after a power cut");
        }
        format!(
            "{text}\n{}",
            out.next_step(&format!("miosa sandbox create --snapshot {} --name NAME --wait", snapshot.id))
        )
    })
}

async fn snapshots(client: &Client, out: Out, command: SnapshotsCommand) -> Result<()> {
    let route = |target: &SnapshotTarget| match target.keys.as_slice() {
        [sandbox, snapshot] => path(sandbox, &format!("/snapshots/{}", escape(snapshot))),
        keys => format!("/snapshots/{}", escape(keys.last().map_or("", String::as_str))),
    };
    match command {
        SnapshotsCommand::List { sandbox } => list_snapshots(client, out, sandbox).await,
        SnapshotsCommand::Tree { sandbox } => super::tree::run(client, out, sandbox).await,
        SnapshotsCommand::Get(target) => {
            let snapshot: Value = client.get(&route(&target)).await?;
            let id = snapshot["id"].as_str().unwrap_or_default().to_owned();
            out.answer(&snapshot, &id, |out| {
                let field = |key| match &snapshot[key] {
                    Value::String(text) => text.clone(),
                    Value::Null => String::new(),
                    other => other.to_string(),
                };
                out.fields(
                    &[
                        "id",
                        "comment",
                        "sandbox_id",
                        "status",
                        "kept",
                        "consistency",
                        "created_at",
                        "expires_at",
                        "size_bytes",
                    ]
                    .map(|k| (k, field(k))),
                )
            })
        }
        SnapshotsCommand::Diff(args) => contents::diff(client, out, args).await,
        SnapshotsCommand::Ls(args) => match &args.key {
            Some(key) => contents::ls(client, out, key, &args).await,
            None => list_snapshots(client, out, None).await,
        },
        SnapshotsCommand::Cat(args) => contents::cat(client, out, args).await,
        SnapshotsCommand::Extract(args) => contents::extract(client, out, args).await,
        SnapshotsCommand::Export(args) => archives::export_snapshot(client, out, args).await,
        SnapshotsCommand::Import(args) => archives::import_snapshot(client, out, args).await,
        SnapshotsCommand::Delete(target) => {
            let snapshot: SnapshotBody = client.delete(&format!("{}?measure=true", route(&target))).await?;
            out.answer(&snapshot, &snapshot.id, |out| {
                let freed = snapshot.freed_bytes.map(|b| format!(" and gives back {}", show_bytes(b)));
                format!(
                    "{} is deleted{}\n{}",
                    snapshot.id,
                    freed.unwrap_or_default(),
                    out.next_step(&format!("miosa sandbox snapshots list {}", snapshot.sandbox_id))
                )
            })
        }
    }
}

async fn list_snapshots(client: &Client, out: Out, sandbox: Option<String>) -> Result<()> {
    let route = sandbox.map_or("/snapshots".to_owned(), |s| path(&s, "/snapshots"));
    let snapshots: Vec<SnapshotBody> = client.get(&route).await?;
    let ids: Vec<_> = snapshots.iter().map(|s| s.id.as_str()).collect();
    out.answer(&snapshots, &ids.join("\n"), |out| {
        if snapshots.is_empty() {
            return format!("no snapshots\n{}", out.next_step("miosa sandbox snapshot SANDBOX --name NAME"));
        }
        let row = |s: &SnapshotBody| {
            let consistency = match s.consistency {
                Consistency::Filesystem => "filesystem",
                Consistency::Crash => "crash",
            };
            let name = s.comment.clone().unwrap_or_default();
            vec![s.id.clone(), name, s.sandbox_id.clone(), s.status.clone(), consistency.to_owned(), age(s.created_at)]
        };
        let rows: Vec<_> = snapshots.iter().map(row).collect();
        out.table(&["ID", "NAME", "SANDBOX", "STATUS", "CONSISTENCY", "AGE"], &rows)
    })
}

async fn fork(client: &Client, out: Out, args: ForkArgs) -> Result<()> {
    let body = ForkBody {
        name: args.name,
        count: args.count,
        snapshot_id: args.snapshot,
        memory: args.memory.then_some(true),
        timeout_sec: None,
        timeout_ms: args.timeout.map(millis),
        metadata: None,
        other: serde_json::Map::new(),
    };
    let route = path(&args.target.sandbox, &format!("/fork?wait={}", args.wait));
    if args.wait {
        out.progress("forking, and waiting until the children can be used …");
    }
    if args.count.is_some() {
        let children: Vec<SandboxBody> = client.post(&route, &body).await?;
        let ids: Vec<_> = children.iter().map(|s| s.id.as_str()).collect();
        out.answer(&children, &ids.join("\n"), |out| {
            let row = |s: &SandboxBody| {
                vec![s.id.clone(), s.name.clone(), s.state.name().to_owned(), s.last_error.clone().unwrap_or_default()]
            };
            format!(
                "{}\n{}",
                out.table(&["ID", "NAME", "STATE", "ERROR"], &children.iter().map(row).collect::<Vec<_>>()),
                out.next_step("miosa sandbox exec ID -- COMMAND")
            )
        })?;
        return all_started(args.wait, &children);
    }
    let child: SandboxBody = client.post(&route, &body).await?;
    out.answer(&child, &child.id, |out| {
        changed(out, &child, &format!("miosa sandbox exec {} -- COMMAND (starts it)", child.id))
    })?;
    all_started(args.wait, std::slice::from_ref(&child))
}

/// The children are printed by now, whether or not they could be started; the exit code tells.
fn all_started(waited: bool, children: &[SandboxBody]) -> Result<()> {
    let down: Vec<_> = children.iter().filter(|c| c.state != State::Running).collect();
    let Some(first) = down.first().filter(|_| waited) else { return Ok(()) };
    let why = first.last_error.as_deref().unwrap_or("it is not running");
    let message = format!("{} of {} children could not be started: {}: {why}", down.len(), children.len(), first.name);
    Err(Failure::new(4, "children_not_started", message)
        .hint(format!("the children are there; start one again: miosa sandbox resume {}", first.id)))
}
