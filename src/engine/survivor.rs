//! Sessions that go on without a daemon: what is left for the next one, and how it takes them over.
//!
//! A session's run directory holds, beside what the VMM keeps there, what only this daemon knows of it: since when it
//! runs, until when, and how its disks are shown. Times are the host's monotonic clock, which one boot of the host shares;
//! a machine does not outlive that either. The files need no sync: they are read after the death of a process only.
//!
//! Taking over, for a sandbox whose machine lives: (1) its disks are shown again where they were, and the VMM, which has been
//! trying, connects; (2) the VMM is taken over, and through it the guest's agent, which ends what it did for the old
//! connection; (3) the record says `running`, and the session's clock goes on. If anything of this fails, the machine is
//! killed and the sandbox comes to rest with what its guest had flushed.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmm::{Accel, BootPath, DiskAttachment};

use super::Shared;
use super::devices::{Devices, VolumeOf};
use super::error::{Error, Result};
use super::lifecycle::{Request, State};
use super::records::SandboxRecord;
use super::sandbox::{OwnerGuard, Sandbox};
use super::session::{Ending, Session, hide};

const RECORD: &str = "session.json";
const DEADLINE: &str = "deadline";
const STATE_KEY: &str = "state-key";
/// How long a VMM that lives may take to come back to its disk.
const RECONNECTION: Duration = Duration::from_secs(30);

/// What the next daemon has to know of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SessionRecord {
    /// Nanoseconds of the monotonic clock.
    began: u64,
    disk: DiskAttachment,
    #[serde(default)]
    volumes: Vec<DiskAttachment>,
    accel: Accel,
}

impl SessionRecord {
    pub(super) fn new(began: Instant, devices: &Devices, accel: Accel) -> Result<Self> {
        let volumes = devices.volumes().into_iter().map(|volume| volume.disk).collect();
        Ok(Self { began: to_monotonic(began)?, disk: devices.root(), volumes, accel })
    }

    /// Writes it into the run directory of a machine that is not there yet.
    pub(super) fn write(&self, run_dir: &Path, deadline: Option<Instant>) -> Result<()> {
        let bytes = serde_json::to_vec(self).map_err(|e| Error::internal(format!("a session's record: {e}")))?;
        std::fs::write(run_dir.join(RECORD), bytes).map_err(|e| unwritable(run_dir, &e))?;
        write_deadline(run_dir, deadline)
    }

    /// The one in this run directory, and the session's end. None if there is none that can be understood: then there
    /// is nothing to take over.
    fn read(run_dir: &Path) -> Option<(Self, Option<Instant>)> {
        let record = serde_json::from_slice(&std::fs::read(run_dir.join(RECORD)).ok()?).ok()?;
        let deadline = std::fs::read_to_string(run_dir.join(DEADLINE)).ok()?;
        let deadline = match deadline.trim().parse().ok()? {
            0 => None,
            nanos => Some(from_monotonic(nanos).ok()?),
        };
        Some((record, deadline))
    }

    pub(super) fn began(&self) -> Result<Instant> {
        from_monotonic(self.began)
    }
}

/// Notes the end of a session. Always as many bytes, so that no reader finds half of it.
pub(super) fn write_deadline(run_dir: &Path, deadline: Option<Instant>) -> Result<()> {
    let nanos = deadline.map_or(Ok(0), to_monotonic)?;
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(run_dir.join(DEADLINE))
        .and_then(|file| file.write_all_at(format!("{nanos:020}\n").as_bytes(), 0))
        .map_err(|e| unwritable(run_dir, &e))
}

/// Notes what a machine must be to go on from the state of this one. What is there was written at its start, by the VMM that
/// it still has.
pub(super) fn write_state_key(run_dir: &Path, key: Option<&str>) -> Result<()> {
    std::fs::write(run_dir.join(STATE_KEY), key.unwrap_or_default()).map_err(|e| unwritable(run_dir, &e))
}

pub(super) fn read_state_key(run_dir: &Path) -> Option<String> {
    std::fs::read_to_string(run_dir.join(STATE_KEY)).ok().filter(|key| !key.is_empty())
}

fn unwritable(run_dir: &Path, error: &std::io::Error) -> Error {
    Error::internal(format!("could not write the session's record in {}: {error}", run_dir.display()))
}

fn monotonic() -> Result<Duration> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|e| Error::internal(format!("no clock: {e}")))?;
    Ok(Duration::from(now))
}

fn to_monotonic(at: Instant) -> Result<u64> {
    let (now, here) = (monotonic()?, Instant::now());
    let at = now.saturating_add(at.saturating_duration_since(here)).saturating_sub(here.saturating_duration_since(at));
    Ok(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX))
}

fn from_monotonic(nanos: u64) -> Result<Instant> {
    let (now, at, here) = (monotonic()?, Duration::from_nanos(nanos), Instant::now());
    let moved = match at.checked_sub(now) {
        Some(later) => here.checked_add(later),
        None => here.checked_sub(now - at),
    };
    moved.ok_or_else(|| Error::internal("a time that no clock here can tell"))
}

/// A session of an earlier daemon whose machine lives, with its disk shown again.
pub(super) struct Survivor {
    record: SessionRecord,
    deadline: Option<Instant>,
    devices: Devices,
}

impl Survivor {
    /// Shows the disks where the machine looks for them. None if that is not possible: the machine's disks are of another
    /// kind, or went with the daemon.
    pub(super) fn find(shared: &Shared, of: &SandboxRecord, volumes: Vec<VolumeOf>) -> Option<Self> {
        let run_dir = shared.settings.run_root.join(&of.id);
        let (record, deadline) = SessionRecord::read(&run_dir)?;
        if !record.disk.outlives_its_server() {
            return None;
        }
        let shown = Devices::show(&shared.store, &*shared.disks, (&of.id, &run_dir), of.disk, volumes);
        let devices = shown
            .inspect_err(|error| {
                tracing::warn!(sandbox = %of.id, %error, "the disks of a machine that lives cannot be shown again");
            })
            .ok()?;
        let same =
            SessionRecord { began: record.began, ..SessionRecord::new(Instant::now(), &devices, record.accel).ok()? };
        if same != record {
            // The daemon's front end is another one now.
            devices.detach();
            return None;
        }
        Some(Self { record, deadline, devices })
    }
}

impl Session {
    /// Takes over a machine that outlived its daemon. On failure nothing is left of it.
    async fn adopt(sandbox: &Arc<Sandbox>, number: u64, survivor: Survivor) -> Result<Session> {
        let (shared, record) = (&sandbox.shared, &sandbox.record());
        let Survivor { record: left, deadline, devices } = survivor;
        let run_dir = shared.settings.run_root.join(&record.id);
        let machine = match shared.vmm.adopt(&run_dir, shared.settings.boot_deadline).await {
            Ok(Some(machine)) => machine,
            Ok(None) => {
                hide(devices, &run_dir).await;
                return Err(Error::internal("the machine ended"));
            }
            Err(error) => {
                hide(devices, &run_dir).await;
                return Err(error.into());
            }
        };
        let began = left.began()?;
        let boot = match record.boot_ms {
            Some(ms) if record.ready_at.is_some() => Duration::from_millis(ms),
            _ => began.elapsed(),
        };
        let mut session = Session::of(number, machine, devices, run_dir, (began, deadline), boot, left.accel);
        // It was held, and has gone on from its own state.
        let went_on = session.way == BootPath::Memory;
        // What is known of a machine that is found does not tell whether it had gone on from memory.
        session.way = record.boot_path.unwrap_or(session.way);
        let usable = async {
            session.until_connected().await?;
            // It was being started: what follows the agent's first answer is still to be done, or done again.
            let woken = went_on || record.boot_path == Some(BootPath::Memory);
            let is_settled = record.state != State::Creating && !went_on;
            if is_settled { Ok(()) } else { session.settle(shared, record, woken).await }
        };
        let usable = usable.await;
        if let Err(error) = usable {
            session.discard(shared).await;
            return Err(error);
        }
        Ok(session)
    }

    async fn until_connected(&self) -> Result<()> {
        let until = Instant::now() + RECONNECTION;
        while !self.is_connected() {
            if Instant::now() >= until {
                return Err(Error::internal("the machine did not come back to its disks"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

impl Sandbox {
    /// Takes over the machine of an earlier daemon's session, or brings the sandbox to rest without it.
    pub(super) async fn adopt(self: &Arc<Self>, mut owner: OwnerGuard, survivor: Survivor) {
        let number = self.next_session(&mut owner);
        let adopted = Session::adopt(self, number, survivor).await;
        match adopted.and_then(|session| self.decide(Request::Adopted).map(|_| session)) {
            Ok(session) => {
                self.begun(&mut owner, session).await;
                tracing::info!(sandbox = %self.id(), "its session goes on");
            }
            Err(error) => self.lost_with_its_daemon(&mut owner, &error).await,
        }
    }

    async fn lost_with_its_daemon(self: &Arc<Self>, owner: &mut OwnerGuard, why: &Error) {
        tracing::warn!(sandbox = %self.id(), %why, "its session did not outlive the daemon");
        self.publish(|r| r.unclean = true);
        let ended = match self.decide(Request::DaemonRestarted) {
            Ok(Some(next)) => self.rest(owner, next, Ending::AlreadyGone, Some(format!("{LOST} ({why})"))).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(sandbox = %self.id(), %error, "the loss of a session could not be recorded in full");
        }
    }

    /// The daemon ends and another takes over: the session goes on without, if its machine can.
    pub(super) async fn leave(self: &Arc<Self>) {
        let mut owner = self.own().await;
        match owner.session.take_if(|session| session.outlives_the_daemon()) {
            Some(session) => {
                if let Err(error) = session.leave().await {
                    tracing::error!(sandbox = %self.id(), %error, "what its guest had written may not be durable");
                }
            }
            None => {
                drop(owner);
                self.shut_down().await;
            }
        }
    }
}

/// What a record says of a session that ended with the daemon.
pub(super) const LOST: &str = "the daemon ended while the sandbox had a session; what it had flushed is kept";

/// The same of one that was to go on from its memory and had not begun to.
pub(super) const NOT_STARTED: &str = "the daemon ended while the sandbox was being started; its memory is kept";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn times_survive_their_process() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SessionRecord::read(dir.path()), None);
        let began = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        let disk = DiskAttachment::VhostUserBlk { socket: "/run/d".into() };
        let volumes = vec![disk.clone()];
        let record = SessionRecord { began: to_monotonic(began).unwrap(), disk, volumes, accel: Accel::Tcg };
        let near = |a: Instant, b: Instant| {
            a.saturating_duration_since(b).max(b.saturating_duration_since(a)) < Duration::from_millis(500)
        };
        for deadline in [None, Some(began + Duration::from_secs(3)), Some(began + Duration::from_secs(3600))] {
            record.write(dir.path(), deadline).unwrap();
            let (read, end) = SessionRecord::read(dir.path()).unwrap();
            assert!(read == record && near(read.began().unwrap(), began));
            assert!(end.is_some() == deadline.is_some() && end.zip(deadline).is_none_or(|(a, b)| near(a, b)));
        }
        std::fs::write(dir.path().join(DEADLINE), "").unwrap();
        assert_eq!(SessionRecord::read(dir.path()), None, "half a record is none");
    }
}
