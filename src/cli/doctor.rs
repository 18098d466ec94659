//! `miosa doctor`.

use serde_json::json;

use super::backend::Place;
use super::output::{Failure, Out, Result};
use crate::api::client;
use crate::api::types::HealthBody;
use crate::config::{Config, ConfigError};
use crate::doctor::{self, Check, Verdict};

pub(super) async fn run(
    place: &Place,
    out: Out,
    (config, broken): (&Config, Option<&ConfigError>),
    fix: bool,
) -> Result<()> {
    let mut checks = doctor::examine(config, broken);
    if fix {
        doctor::fix(&checks, |command| eprintln!("+ {command}"))
            .map_err(|why| Failure::new(1, "fix_failed", why).hint("as root: sudo miosa doctor --fix"))?;
        checks = doctor::examine(config, broken);
    }
    checks.push(daemon(place).await);
    let failed = checks.iter().filter(|c| c.status == Verdict::Fail).count();
    let document = json!({ "ok": failed == 0, "checks": checks });
    out.answer(&document, "", |out| {
        let row = |check: &Check| {
            let status = match check.status {
                Verdict::Ok => "ok",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let hint = check.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
            vec![status.to_owned(), check.name.to_owned(), format!("{}{hint}", check.message)]
        };
        out.table(&["", "CHECK", "FOUND"], &checks.iter().map(row).collect::<Vec<_>>())
    })?;
    match failed {
        0 => Ok(()),
        _ => Err(Failure::told(1)),
    }
}

/// Whether a daemon answers, and whether it is of this version.
async fn daemon(place: &Place) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    match place.client.get::<HealthBody>("/health").await {
        Ok(health) if health.version == own => Check::ok("daemon", format!("answers, version {own}")),
        Ok(health) => Check::warn(
            "daemon",
            format!("is of version {}, and this program of {own}", health.version),
            "restart the daemon with this version",
        ),
        Err(client::Error::Unreachable { place, source }) => {
            Check::warn("daemon", format!("does not answer on {place}: {source}"), "start it: miosa daemon")
        }
        Err(error) => Check::warn("daemon", error.to_string(), "see its log"),
    }
}
