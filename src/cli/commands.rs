//! `miosa sandbox exec --detached` and `miosa sandbox command …`: commands that run on their own.

use super::args::{DetachedCommand, DetachedTarget, ExecArgs};
use super::exec::{bytes_of, pass_on, refusal};
use super::output::{Failure, Out, Result};
use super::sandbox::{age, path};
use crate::api::client::{Client, escape};
use crate::api::types::{Command, CommandBody, CommandLogsBody, CommandRequestBody, KillBody};

/// Starts a command and leaves it alone.
pub(super) async fn start(client: &Client, out: Out, args: ExecArgs) -> Result<()> {
    let body = CommandRequestBody {
        command: Command::Argv(args.command),
        cwd: args.surroundings.cwd,
        env: Some(args.surroundings.env.into_iter().collect()),
        user: args.surroundings.user,
        sudo: None,
        timeout_seconds: args.timeout.map(|t| t.as_secs_f64()),
        stdin: None,
        detached: true,
        name: args.name,
        other: serde_json::Map::new(),
    };
    let sandbox = &args.target.sandbox;
    let started: CommandBody = client.post(&path(sandbox, "/commands"), &body).await?;
    out.answer(&started, &started.id, |out| {
        let next = format!("miosa sandbox command logs {sandbox} {} --follow", started.id);
        format!("{} runs\n{}", out.strong(&started.id), out.next_step(&next))
    })
}

pub(super) async fn run(client: &Client, out: Out, command: DetachedCommand) -> Result<()> {
    match command {
        DetachedCommand::List(target) => {
            let all: Vec<CommandBody> = client.get(&path(&target.sandbox, "/commands")).await?;
            let ids: Vec<_> = all.iter().map(|c| c.id.as_str()).collect();
            out.answer(&all, &ids.join("\n"), |out| table(out, &target.sandbox, &all))
        }
        DetachedCommand::Get(target) => {
            let command: CommandBody = client.get(&route(&target, "")).await?;
            out.answer(&command, &command.id, |out| show(out, &command))
        }
        DetachedCommand::Logs { target, follow } => logs(client, out, &target, follow).await,
        DetachedCommand::Kill { target, signal } => {
            let body = KillBody { signal, ..KillBody::default() };
            let command: CommandBody = client.post(&route(&target, "/kill"), &body).await?;
            out.answer(&command, &command.id, |out| show(out, &command))
        }
    }
}

fn route(target: &DetachedTarget, rest: &str) -> String {
    path(&target.target.sandbox, &format!("/commands/{}{rest}", escape(&target.id)))
}

/// As one document once all is there; otherwise each output where it belongs, as it comes.
async fn logs(client: &Client, out: Out, target: &DetachedTarget, follow: bool) -> Result<()> {
    if out.json && !follow {
        let logs: CommandLogsBody = client.get(&route(target, "/logs")).await?;
        return out.answer(&logs, "", |_| String::new());
    }
    let mut events = client.watch(&route(target, &format!("/logs?encoding=base64&follow={follow}"))).await?;
    while let Some((name, data)) = events.next_event().await? {
        match name.as_str() {
            // With --json nothing is told before the end, and then one document.
            "stdout" if !out.json => pass_on(std::io::stdout().lock(), &bytes_of(&data)?)?,
            "stderr" if !out.json => pass_on(std::io::stderr().lock(), &bytes_of(&data)?)?,
            "error" => return Err(refusal(&data)),
            "exit" if out.json => {
                let logs: CommandLogsBody = client.get(&route(target, "/logs")).await?;
                return out.answer(&logs, "", |_| String::new());
            }
            "exit" => return Ok(()),
            _ => {}
        }
    }
    match follow {
        false => Ok(()),
        true => Err(Failure::new(2, "connection_broken", "the daemon's answer broke off before the command's end")
            .hint("see whether it still runs: miosa sandbox command list SANDBOX")),
    }
}

fn ended(command: &CommandBody) -> String {
    command.exit_code.map_or(command.status.clone(), |code| format!("{} {code}", command.status))
}

fn table(out: &Out, sandbox: &str, all: &[CommandBody]) -> String {
    if all.is_empty() {
        let next = format!("miosa sandbox exec {sandbox} --detached -- COMMAND");
        return format!("no commands\n{}", out.next_step(&next));
    }
    let row = |c: &CommandBody| {
        let name = c.name.clone().unwrap_or_default();
        vec![c.id.clone(), c.pid.to_string(), name, ended(c), age(c.started_at), c.command.clone()]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    out.table(&["ID", "PID", "NAME", "STATUS", "AGE", "COMMAND"], &rows)
}

fn show(out: &Out, command: &CommandBody) -> String {
    out.fields(&[
        ("id", command.id.clone()),
        ("pid", command.pid.to_string()),
        ("name", command.name.clone().unwrap_or_default()),
        ("command", command.command.clone()),
        ("status", ended(command)),
        ("output", crate::units::show_bytes(command.output_bytes)),
    ])
}
