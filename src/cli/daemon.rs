//! What `miosa daemon` prints instead of running.

use std::io::Write;
use std::path::Path;

use super::output::{Failure, Result};
use crate::config::Config;

/// The settings that result, as a configuration file.
pub(super) fn print_config(config: &Config) -> Result<()> {
    let text = toml::to_string(config)
        .map_err(|e| Failure::new(4, "internal_error", format!("the configuration cannot be printed: {e}")))?;
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// A unit that runs this program with this file and state directory.
pub(super) fn print_systemd_unit(config: &Config, file: Option<&Path>) -> Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Failure::new(4, "internal_error", format!("this program was not found: {e}")))?;
    let mut start = quote(&program)?;
    if let Some(file) = file {
        let file = std::path::absolute(file)
            .map_err(|e| Failure::user("invalid_input", format!("{} cannot be used: {e}", file.display())))?;
        start.push_str(&format!(" --config {}", quote(&file)?));
    }
    start.push_str(&format!(" --state-dir {}", quote(&config.state_dir)?));
    // Guests are asked to shut down, one deadline for all, and then the store is closed.
    let stop = config.stop_timeout.0.as_secs() + 60;
    let unit = format!(
        "[Unit]\n\
         Description=miosa, persistent sandboxes\n\
         After=network-online.target\n\
         Wants=network-online.target\n\
         \n\
         [Service]\n\
         Type=notify\n\
         ExecStart={start} daemon\n\
         Restart=on-failure\n\
         TimeoutStartSec=infinity\n\
         TimeoutStopSec={stop}\n\
         # Machines are the daemon's to end: at a stop it does, at a restart it leaves them to its successor.\n\
         KillMode=process\n\
         Delegate=yes\n\
         RestartKillSignal=SIGUSR2\n\
         LimitNOFILE=1048576\n\
         TasksMax=infinity\n\
         UMask=0077\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n"
    );
    Ok(std::io::stdout().write_all(unit.as_bytes())?)
}

/// As a unit file wants a word.
fn quote(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains(['\n', '"', '\\']));
    let text = text.ok_or_else(|| {
        Failure::user("invalid_input", format!("a unit file cannot name the path {}", path.display()))
    })?;
    Ok(format!("\"{}\"", text.replace('%', "%%").replace('$', "$$")))
}
