//! Commands that run on their own in a sandbox's session. The guest's agent keeps them and the end of their output; they
//! end with the session, and looking at them starts none and is no use of the sandbox.

use vmm::agent::ExecStream;
use vmm::{Agent, CommandStatus, ErrorKind, GuestErrorKind};

use super::Engine;
use super::error::{Error, Kind, Result};
use super::guest::{ExecSpec, RunningExec, check_exec, exec_error, use_guest};
use super::records::new_id;
use super::sandbox::Sandbox;

impl Engine {
    /// Starts a program and leaves it alone.
    pub async fn start_command(&self, key: &str, name: Option<String>, spec: ExecSpec) -> Result<CommandStatus> {
        let sandbox = self.find(key)?;
        check_exec(&spec)?;
        if spec.stdin || spec.tty.is_some() {
            return Err(Error::new(
                Kind::UnsupportedOption,
                "a detached command has no standard input and no terminal",
            )
            .hint("write the input to a file first, and read it: sh -lc \"COMMAND < FILE\""));
        }
        let metrics = self.shared.metrics.clone();
        self.detached(async move {
            let request = spec.into_request(&sandbox);
            let start =
                |agent: Agent| async move { agent.start(new_id("cmd"), name, request).await.map_err(exec_error) };
            let status = use_guest(&sandbox, start).await?;
            metrics.exec_started();
            Ok(status)
        })
        .await
    }

    /// The commands of the present session, oldest first.
    pub async fn commands(&self, key: &str) -> Result<Vec<CommandStatus>> {
        match agent_of(&*self.find(key)?).await {
            Some(agent) => Ok(agent.commands().await?),
            None => Ok(Vec::new()),
        }
    }

    /// One of them, by its id or its number in the guest.
    pub async fn command(&self, key: &str, id: &str) -> Result<CommandStatus> {
        let all = self.commands(key).await?;
        // Numbers come back; the last one is meant.
        let found = all.into_iter().rev().find(|c| c.id == id || c.pid.to_string() == id);
        found.ok_or_else(|| not_found(id))
    }

    /// What is kept of a command's output; with `follow` all until its end.
    pub async fn command_logs(&self, key: &str, id: &str, follow: bool) -> Result<RunningExec> {
        let command = self.command(key, id).await?.id;
        let Some(agent) = agent_of(&*self.find(key)?).await else { return Err(not_found(id)) };
        let stream: ExecStream = agent.command_logs(command, follow).await?;
        Ok(RunningExec::looking(stream))
    }

    /// Signals a command's process group; without a signal ends it.
    pub async fn kill_command(&self, key: &str, id: &str, signal: Option<i32>) -> Result<CommandStatus> {
        let command = self.command(key, id).await?.id;
        let Some(agent) = agent_of(&*self.find(key)?).await else { return Err(not_found(id)) };
        agent.kill_command(command, signal).await.map_err(|error| match error.kind {
            ErrorKind::Guest(GuestErrorKind::Invalid) => Error::invalid(error.message),
            ErrorKind::Guest(GuestErrorKind::NotFound) => not_found(id),
            _ => error.into(),
        })
    }
}

fn not_found(id: &str) -> Error {
    Error::new(Kind::ExecNotFound, format!("no command {id:?} runs or is remembered in the sandbox's session"))
        .hint("miosa sandbox command list SANDBOX; commands end with the session they were started in")
}

/// Of the session, if there is one; not held up by what is done with the sandbox afterwards.
pub(super) async fn agent_of(sandbox: &Sandbox) -> Option<Agent> {
    sandbox.own().await.session.as_ref().map(|session| session.agent())
}
