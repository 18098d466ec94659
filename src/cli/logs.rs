//! `miosa sandbox logs`: the guest's console.

use super::args::LogsArgs;
use super::exec::{bytes_of, pass_on, refusal};
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::Client;
use crate::api::types::LogsBody;

pub(super) async fn run(client: &Client, out: Out, args: LogsArgs) -> Result<()> {
    let sandbox = &args.target.sandbox;
    if out.json && (args.follow || args.raw) {
        return Err(Failure::user("invalid_input", "a console that is followed or raw is no JSON document")
            .hint(format!("miosa sandbox logs {sandbox} --json; or without --json")));
    }
    if !args.follow && !args.raw {
        let logs: LogsBody = client.get(&path(sandbox, "/logs")).await?;
        return out.answer(&logs, logs.logs.trim_end(), |_| logs.logs.trim_end().to_owned());
    }
    let (follow, encoding) = (args.follow, if args.raw { "base64" } else { "lines" });
    let mut events = client.watch(&path(sandbox, &format!("/logs/stream?follow={follow}&encoding={encoding}"))).await?;
    while let Some((name, data)) = events.next_event().await? {
        match (name.as_str(), data["line"].as_str()) {
            ("log", Some(line)) => pass_on(std::io::stdout().lock(), format!("{line}\n").as_bytes())?,
            ("log", None) => pass_on(std::io::stdout().lock(), &bytes_of(&data)?)?,
            ("end", _) => return Ok(()),
            ("error", _) => return Err(refusal(&data)),
            _ => {}
        }
    }
    Err(Failure::new(2, "connection_broken", "the daemon's answer broke off before the session's end")
        .hint("see whether the daemon still runs: miosa sandbox show SANDBOX"))
}
