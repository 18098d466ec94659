//! What may happen to a sandbox, and what becomes of it: one pure table, no clock, no lock, no I/O.
//!
//! ```text
//!                     resume / exec / file                 snapshot, fork
//!   create ──► creating ◄──────────────── paused ◄──┐   ┌──────────────────► snapshotting
//!                │  │                        ▲      │   │                        │
//!        started │  │ start failed           │      │   │    checkpoint done     │
//!                │  └───────────► error ─────┤      │   │◄───────────────────────┘
//!                ▼   ◄─ resume ───┘   stop   │      │   │
//!             running ───────────────────────┘      │   │
//!                │ ▲  stop, timeout, machine lost   │   │
//!                │ └────────────────────────────────┼───┘
//!                ▼                                  │
//!            destroyed ◄── destroy, from every state (and, for a non-persistent sandbox, wherever a persistent one
//!                          would become paused by stop, timeout, loss of its machine, or a restart of the daemon
//!                          that its machine did not outlive; one that did is running again)
//! ```
//!
//! A sandbox is driven by one owner at a time (see `sandbox`), so a transition in progress (`creating`,
//! `snapshotting`) is always somebody's: whoever else asks then is told [`Decision::Wait`], which the owner's lock turns
//! into a queue.

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life. The names are the API's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A session is being started.
    Creating,
    /// Compute is active.
    Running,
    /// A consistent state is being taken from the running machine.
    Snapshotting,
    /// No compute; the file system is preserved.
    Paused,
    /// The last session could not be started. The file system is as it was; resume tries again.
    Error,
    /// Permanently deleted.
    Destroyed,
}

impl State {
    /// Every state, for tables and tests.
    pub const ALL: [State; 6] =
        [State::Creating, State::Running, State::Snapshotting, State::Paused, State::Error, State::Destroyed];

    /// The name used in the API and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            State::Creating => "creating",
            State::Running => "running",
            State::Snapshotting => "snapshotting",
            State::Paused => "paused",
            State::Error => "error",
            State::Destroyed => "destroyed",
        }
    }

    /// The state of this name.
    pub fn parse(name: &str) -> Option<State> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// What a caller asks for, or what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Start a session now.
    Resume,
    /// Exec or a file operation: needs a session, starts one when there is none.
    Use,
    /// End the session, keep the file system.
    Stop,
    /// Take a named state.
    Snapshot,
    /// Make new sandboxes on the present state.
    Fork,
    /// Put the file system back to a snapshot of it.
    Restore,
    /// Move the session's timeout.
    Extend,
    /// Change what it is made with.
    Update,
    /// Give it a volume, or take one away.
    Attach,
    /// Delete for good.
    Destroy,
    /// The machine's agent answers.
    Started,
    /// The machine could not be started.
    StartFailed,
    /// The state was taken (or could not be): the machine goes on.
    CheckpointDone,
    /// The session's time is up.
    Expired,
    /// The machine ended without being asked to.
    MachineLost,
    /// The daemon starts and finds this record; no machine of before is left.
    DaemonRestarted,
    /// The daemon starts and has taken over the machine of before.
    Adopted,
}

impl Request {
    /// Every request and event, for tables and tests.
    pub const ALL: [Request; 17] = [
        Request::Resume,
        Request::Use,
        Request::Stop,
        Request::Snapshot,
        Request::Fork,
        Request::Restore,
        Request::Extend,
        Request::Update,
        Request::Attach,
        Request::Destroy,
        Request::Started,
        Request::StartFailed,
        Request::CheckpointDone,
        Request::Expired,
        Request::MachineLost,
        Request::DaemonRestarted,
        Request::Adopted,
    ];
}

/// What to do about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Do the work; the sandbox is then in this state.
    Next(State),
    /// Do the work, if there is any; the state stays.
    Stay,
    /// A transition is in progress. Ask again when it has ended.
    Wait,
    /// No, and why.
    Refuse(Refusal),
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The sandbox is gone for good.
    Destroyed,
    /// There is no session, and this request does not start one.
    NotRunning,
    /// There is a session, whose machine has the disks that it began with.
    Running,
    /// The event belongs to a session that has ended.
    Stale,
}

/// The table.
pub fn decide(state: State, request: Request, persistent: bool) -> Decision {
    use Decision::{Next, Refuse, Stay, Wait};
    use State::{Creating, Destroyed, Error, Paused, Running, Snapshotting};
    // Where a sandbox goes when its compute ends and nobody asked for its deletion.
    let at_rest = if persistent { Paused } else { Destroyed };
    match (request, state) {
        (Request::Destroy, Destroyed) => Stay,
        (Request::DaemonRestarted | Request::MachineLost | Request::Expired, Destroyed) => Stay,
        (Request::Started | Request::StartFailed | Request::CheckpointDone | Request::Adopted, Destroyed) => {
            Refuse(Refusal::Stale)
        }
        (_, Destroyed) => Refuse(Refusal::Destroyed),

        (Request::Resume | Request::Use, Running) => Stay,
        (Request::Resume | Request::Use, Paused | Error) => Next(Creating),

        (Request::Stop, Running | Error) => Next(at_rest),
        (Request::Stop, Paused) => Stay,

        (Request::Snapshot | Request::Fork, Running) => Next(Snapshotting),
        (Request::Snapshot | Request::Fork, Paused | Error) => Stay,

        // The session ends with what it had written; a new one is a request of its own.
        (Request::Restore, Running | Error) => Next(Paused),
        (Request::Restore, Paused) => Stay,

        (Request::Extend, Running) | (Request::Update, Running | Paused | Error) => Stay,
        (Request::Extend, Paused | Error) => Refuse(Refusal::NotRunning),

        (Request::Attach, Running) => Refuse(Refusal::Running),
        (Request::Attach, Paused | Error) => Stay,

        (Request::Destroy, Running | Paused | Error) => Next(Destroyed),

        (
            Request::Resume
            | Request::Use
            | Request::Stop
            | Request::Snapshot
            | Request::Fork
            | Request::Restore
            | Request::Extend
            | Request::Update
            | Request::Attach
            | Request::Destroy,
            Creating | Snapshotting,
        ) => Wait,

        (Request::Started, Creating) => Next(Running),
        (Request::StartFailed, Creating) => Next(Error),
        (Request::CheckpointDone, Snapshotting) => Next(Running),
        (Request::Started | Request::StartFailed | Request::CheckpointDone, _) => Refuse(Refusal::Stale),

        (Request::Expired, Running) => Next(at_rest),
        (Request::Expired, Creating | Snapshotting) => Wait,
        (Request::Expired, Paused | Error) => Stay,

        (Request::MachineLost, Running | Snapshotting) => Next(at_rest),
        (Request::MachineLost, Creating) => Wait,
        (Request::MachineLost, Paused | Error) => Stay,

        (Request::DaemonRestarted, Creating | Running | Snapshotting) => Next(at_rest),
        (Request::DaemonRestarted, Paused | Error) if persistent => Stay,
        (Request::DaemonRestarted, Paused | Error) => Next(Destroyed),

        (Request::Adopted, Creating | Running | Snapshotting) => Next(Running),
        (Request::Adopted, Paused | Error) => Refuse(Refusal::Stale),
    }
}

#[cfg(test)]
mod tests {
    use super::{Decision, Refusal, Request, State, decide};

    /// One row a request; columns creating, running, snapshotting, paused, error, destroyed.
    /// `rest` stands for paused, or destroyed when the sandbox is not persistent.
    const TABLE: [(Request, [&str; 6]); 17] = [
        (Request::Resume, ["wait", "stay", "wait", "creating", "creating", "gone"]),
        (Request::Use, ["wait", "stay", "wait", "creating", "creating", "gone"]),
        (Request::Stop, ["wait", "rest", "wait", "stay", "rest", "gone"]),
        (Request::Snapshot, ["wait", "snapshotting", "wait", "stay", "stay", "gone"]),
        (Request::Fork, ["wait", "snapshotting", "wait", "stay", "stay", "gone"]),
        (Request::Restore, ["wait", "paused", "wait", "stay", "paused", "gone"]),
        (Request::Extend, ["wait", "stay", "wait", "not-running", "not-running", "gone"]),
        (Request::Update, ["wait", "stay", "wait", "stay", "stay", "gone"]),
        (Request::Attach, ["wait", "running!", "wait", "stay", "stay", "gone"]),
        (Request::Destroy, ["wait", "destroyed", "wait", "destroyed", "destroyed", "stay"]),
        (Request::Started, ["running", "stale", "stale", "stale", "stale", "stale"]),
        (Request::StartFailed, ["error", "stale", "stale", "stale", "stale", "stale"]),
        (Request::CheckpointDone, ["stale", "stale", "running", "stale", "stale", "stale"]),
        (Request::Expired, ["wait", "rest", "wait", "stay", "stay", "stay"]),
        (Request::MachineLost, ["wait", "rest", "rest", "stay", "stay", "stay"]),
        (Request::DaemonRestarted, ["rest", "rest", "rest", "stay-or-destroyed", "stay-or-destroyed", "stay"]),
        (Request::Adopted, ["running", "running", "running", "stale", "stale", "stale"]),
    ];

    fn expected(cell: &str, persistent: bool) -> Decision {
        match cell {
            "wait" => Decision::Wait,
            "stay" => Decision::Stay,
            "gone" => Decision::Refuse(Refusal::Destroyed),
            "not-running" => Decision::Refuse(Refusal::NotRunning),
            "running!" => Decision::Refuse(Refusal::Running),
            "stale" => Decision::Refuse(Refusal::Stale),
            "rest" => Decision::Next(if persistent { State::Paused } else { State::Destroyed }),
            "stay-or-destroyed" if persistent => Decision::Stay,
            "stay-or-destroyed" => Decision::Next(State::Destroyed),
            name => Decision::Next(State::parse(name).expect("a state's name")),
        }
    }

    #[test]
    fn every_cell_of_the_table_is_as_drawn() {
        assert_eq!(TABLE.map(|(r, _)| r), Request::ALL, "the table names every request once");
        for (request, cells) in TABLE {
            for (state, cell) in State::ALL.into_iter().zip(cells) {
                for persistent in [true, false] {
                    assert_eq!(
                        decide(state, request, persistent),
                        expected(cell, persistent),
                        "{request:?} in {state:?}, persistent: {persistent}"
                    );
                }
            }
        }
    }

    #[test]
    fn destroyed_is_terminal() {
        for request in Request::ALL {
            for persistent in [true, false] {
                assert!(!matches!(decide(State::Destroyed, request, persistent), Decision::Next(_)), "{request:?}");
            }
        }
    }

    #[test]
    fn a_persistent_sandbox_is_destroyed_by_destroy_alone() {
        for request in Request::ALL {
            for state in State::ALL {
                if decide(state, request, true) == Decision::Next(State::Destroyed) {
                    assert_eq!(request, Request::Destroy, "in {state:?}");
                }
            }
        }
    }

    #[test]
    fn no_restart_leaves_a_state_that_needs_a_machine() {
        for state in State::ALL {
            for persistent in [true, false] {
                let after = match decide(state, Request::DaemonRestarted, persistent) {
                    Decision::Next(next) => next,
                    Decision::Stay => state,
                    other => panic!("{state:?}: {other:?}"),
                };
                assert!(matches!(after, State::Paused | State::Error | State::Destroyed), "{state:?} became {after:?}");
            }
        }
    }
}
