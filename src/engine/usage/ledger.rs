//! What one sandbox used over time, made of what was told at certain moments. Pure: it has no clock and no store.
//!
//! Compute is a list of sessions; saved state is a list of levels, each of which lasts until the next. Both are bounded:
//! the two oldest entries of a list that is too long become one. Sums over all time stay as they are then; what is lost is
//! when exactly, long ago.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Most sessions that are told apart.
pub const MAX_SESSIONS: usize = 64;
/// Most levels that are told apart.
pub const MAX_LEVELS: usize = 128;

/// Bytes that are kept for a sandbox and its snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Saved {
    /// What disk and snapshots hold, each counted in full.
    pub logical_bytes: u64,
    /// Stored bytes that any of them refers to, shared with others or not.
    pub referenced_bytes: u64,
    /// Of these, what nothing else refers to: about what giving up all of it would give back.
    pub exclusive_bytes: u64,
}

/// A run of a machine. Times are in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// `ses-…`
    pub id: String,
    /// When it began.
    pub from_ms: i64,
    /// When it ended, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<i64>,
    /// When it was last known to go on.
    pub seen_ms: i64,
    /// Its processors.
    pub cpus: u32,
    /// Its memory.
    pub memory_mib: u64,
}

/// Runs that are not told apart any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Earlier {
    from_ms: i64,
    until_ms: i64,
    sessions: u64,
    compute: Compute,
}

/// What sessions had, over time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compute {
    /// How long they lasted.
    pub runtime_ms: u64,
    /// That, times their processors.
    pub vcpu_ms: u64,
    /// That, times their memory in MiB.
    pub memory_mib_ms: u64,
}

/// Saved bytes times the milliseconds that they were kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SavedTime {
    /// See [`Saved`].
    pub logical: u128,
    /// See [`Saved`].
    pub referenced: u128,
    /// See [`Saved`].
    pub exclusive: u128,
}

/// What was used within a period.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// How many sessions were going on within it.
    pub sessions: u64,
    /// Their parts within it.
    pub compute: Compute,
    /// What was kept.
    pub saved: SavedTime,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ledger {
    earlier: Option<Earlier>,
    /// By time; at most the last one goes on.
    runs: Vec<Run>,
    /// When each level began, by time.
    levels: Vec<(i64, Saved)>,
}

impl Ledger {
    /// A session begins. One that was not ended has ended when it was last seen.
    pub fn began(&mut self, id: &str, now: Timestamp, cpus: u32, memory_mib: u64) {
        self.ended(None);
        let after = self.runs.last().and_then(|r| r.until_ms).unwrap_or(i64::MIN);
        let from_ms = now.as_millisecond().max(after);
        self.runs.push(Run { id: id.to_owned(), from_ms, until_ms: None, seen_ms: from_ms, cpus, memory_mib });
        while self.runs.len() > MAX_SESSIONS {
            self.forget_oldest_run();
        }
    }

    fn forget_oldest_run(&mut self) {
        let run = self.runs.remove(0);
        let (from, until) = (run.from_ms, run.until_ms.unwrap_or(run.seen_ms));
        let none = Earlier { from_ms: from, until_ms: until, sessions: 0, compute: Compute::default() };
        let earlier = self.earlier.get_or_insert(none);
        earlier.until_ms = until;
        earlier.sessions += 1;
        earlier.compute.add(run.over(i64::MIN, i64::MAX, until).compute);
    }

    /// A session goes on. That it lasts has to be told from time to time: when it ends without a word, this is the last that
    /// is known of it.
    pub fn goes_on(&mut self, ran_ms: u64) -> bool {
        match self.runs.last_mut() {
            Some(run) if run.until_ms.is_none() => {
                run.seen_ms = run.seen_ms.max(run.from_ms.saturating_add_unsigned(ran_ms));
                true
            }
            _ => false,
        }
    }

    /// A session ends that lasted so long, or when it was last seen; what it had, unless none was going on.
    pub fn ended(&mut self, ran_ms: Option<u64>) -> Option<Compute> {
        let run = self.runs.last_mut().filter(|run| run.until_ms.is_none())?;
        let until = ran_ms.map_or(run.seen_ms, |ms| run.from_ms.saturating_add_unsigned(ms));
        (run.seen_ms, run.until_ms) = (until, Some(until));
        Some(run.over(i64::MIN, i64::MAX, until).compute)
    }

    /// What is kept from now on. Whether that is another level.
    pub fn saves(&mut self, now: Timestamp, saved: Saved) -> bool {
        let last = self.levels.last().copied();
        if last.map_or(Saved::default(), |(_, level)| level) == saved {
            return false;
        }
        // A clock that was put back does not undo what was.
        let at = now.as_millisecond().max(last.map_or(i64::MIN, |(at, _)| at));
        self.levels.push((at, saved));
        while self.levels.len() > MAX_LEVELS {
            self.merge_oldest_levels();
        }
        true
    }

    fn merge_oldest_levels(&mut self) {
        let [(a, one), (b, two), (c, _)] = self.levels[..3] else { return };
        let (first, second) = ((b - a) as u128, (c - b) as u128);
        let mean = |x: u64, y: u64| {
            let both = first + second;
            (u128::from(x) * first + u128::from(y) * second + both / 2).checked_div(both).map_or(y, |mean| mean as u64)
        };
        let merged = Saved {
            logical_bytes: mean(one.logical_bytes, two.logical_bytes),
            referenced_bytes: mean(one.referenced_bytes, two.referenced_bytes),
            exclusive_bytes: mean(one.exclusive_bytes, two.exclusive_bytes),
        };
        self.levels.splice(..2, [(a, merged)]);
    }

    /// What is kept, as far as is known, and since when.
    pub fn saved(&self) -> Option<(Timestamp, Saved)> {
        let (at, saved) = self.levels.last()?;
        Some((Timestamp::from_millisecond(*at).ok()?, *saved))
    }

    /// Sessions that are told apart, oldest first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// When anything was last told of it.
    pub fn last_ms(&self) -> i64 {
        let run = self.runs.last().map_or(i64::MIN, |r| r.seen_ms);
        run.max(self.levels.last().map_or(i64::MIN, |(at, _)| *at))
    }

    /// What was used from `from` to `until`, as it is known at `now`; a session that goes on is believed to until then.
    pub fn over(&self, from: Timestamp, until: Timestamp, now: Timestamp) -> Used {
        let now = now.as_millisecond();
        let (from, until) = (from.as_millisecond(), until.as_millisecond().min(now));
        let mut used = Used::default();
        if from >= until {
            return used;
        }
        if let Some(earlier) = &self.earlier {
            used.add(earlier.over(from, until));
        }
        self.runs.iter().for_each(|run| used.add(run.over(from, until, now)));
        for (i, (at, saved)) in self.levels.iter().enumerate() {
            let end = self.levels.get(i + 1).map_or(i64::MAX, |(next, _)| *next);
            let ms = u128::from(overlap((*at, end), (from, until)));
            used.saved.logical += u128::from(saved.logical_bytes) * ms;
            used.saved.referenced += u128::from(saved.referenced_bytes) * ms;
            used.saved.exclusive += u128::from(saved.exclusive_bytes) * ms;
        }
        used
    }
}

impl Run {
    /// Its part of a period.
    pub fn over(&self, from_ms: i64, until_ms: i64, now_ms: i64) -> Used {
        let end = self.until_ms.unwrap_or(now_ms.max(self.seen_ms));
        let runtime_ms = overlap((self.from_ms, end), (from_ms, until_ms));
        // One without length is one all the same.
        let within = self.from_ms < until_ms && (end > from_ms || self.from_ms >= from_ms);
        let vcpu_ms = runtime_ms.saturating_mul(self.cpus.into());
        let compute = Compute { runtime_ms, vcpu_ms, memory_mib_ms: runtime_ms.saturating_mul(self.memory_mib) };
        Used { sessions: u64::from(within), compute, ..Used::default() }
    }
}

impl Earlier {
    /// Its part of a period, as if it had been spread evenly.
    fn over(&self, from: i64, until: i64) -> Used {
        if self.until_ms < from || self.from_ms >= until {
            return Used::default();
        }
        let all = (self.from_ms, self.until_ms);
        let (part, whole) = (overlap(all, (from, until)), overlap(all, all));
        let share = |sum: u64| match whole {
            0 => sum,
            whole => (u128::from(sum) * u128::from(part) / u128::from(whole)) as u64,
        };
        let Compute { runtime_ms, vcpu_ms, memory_mib_ms } = self.compute;
        let compute =
            Compute { runtime_ms: share(runtime_ms), vcpu_ms: share(vcpu_ms), memory_mib_ms: share(memory_mib_ms) };
        Used { sessions: share(self.sessions), compute, ..Used::default() }
    }
}

impl Compute {
    /// Adds another.
    pub fn add(&mut self, other: Compute) {
        self.runtime_ms = self.runtime_ms.saturating_add(other.runtime_ms);
        self.vcpu_ms = self.vcpu_ms.saturating_add(other.vcpu_ms);
        self.memory_mib_ms = self.memory_mib_ms.saturating_add(other.memory_mib_ms);
    }
}

impl Used {
    /// Adds another.
    pub fn add(&mut self, other: Used) {
        self.sessions += other.sessions;
        self.compute.add(other.compute);
        self.saved.logical += other.saved.logical;
        self.saved.referenced += other.saved.referenced;
        self.saved.exclusive += other.saved.exclusive;
    }
}

/// Milliseconds that two stretches have in common.
fn overlap(a: (i64, i64), b: (i64, i64)) -> u64 {
    a.1.min(b.1).checked_sub(a.0.max(b.0)).and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_700_000_000_000 + ms).unwrap()
    }

    fn saved(bytes: u64) -> Saved {
        Saved { logical_bytes: 4 * bytes, referenced_bytes: 2 * bytes, exclusive_bytes: bytes }
    }

    #[test]
    fn compute_moves_to_saved_state() {
        let mut ledger = Ledger::default();
        ledger.began("one", at(0), 2, 512);
        assert!(ledger.saves(at(1_000), saved(10)));
        ledger.ended(Some(5_000));
        assert!(ledger.saves(at(5_000), saved(30)));
        assert!(!ledger.saves(at(7_000), saved(30)), "nothing has changed");
        let used = ledger.over(at(0), at(10_000), at(10_000));
        assert_eq!(used.sessions, 1);
        let compute = Compute { runtime_ms: 5_000, vcpu_ms: 10_000, memory_mib_ms: 2_560_000 };
        assert_eq!(used.compute, compute);
        assert_eq!(used.saved.exclusive, 4_000 * 10 + 5_000 * 30);
        assert_eq!((used.saved.referenced, used.saved.logical), (2 * used.saved.exclusive, 4 * used.saved.exclusive));
        // Later there is saved state alone; and none once it is given up.
        let later = ledger.over(at(6_000), at(10_000), at(10_000));
        assert_eq!((later.compute, later.saved.exclusive), (Compute::default(), 4_000 * 30));
        ledger.saves(at(10_000), Saved::default());
        assert_eq!(ledger.over(at(10_000), at(20_000), at(20_000)), Used::default());
    }

    #[test]
    fn what_is_to_come_is_not_used_yet() {
        let mut ledger = Ledger::default();
        ledger.began("one", at(0), 1, 1);
        ledger.saves(at(0), saved(1));
        let used = ledger.over(at(-5_000), at(60_000), at(2_000));
        assert_eq!((used.compute.runtime_ms, used.saved.exclusive), (2_000, 2_000));
    }

    #[test]
    fn a_session_that_ends_without_a_word_lasted_until_it_was_last_seen() {
        let mut ledger = Ledger::default();
        ledger.began("one", at(0), 1, 1);
        assert!(ledger.goes_on(3_000) && ledger.goes_on(2_000));
        let mut found: Ledger = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
        assert_eq!(found, ledger);
        found.ended(None);
        assert!(!found.goes_on(9_000), "it has ended");
        assert_eq!(found.over(at(0), at(60_000), at(60_000)).compute.runtime_ms, 3_000);
        ledger.began("two", at(50_000), 1, 1);
        assert_eq!(ledger.over(at(0), at(60_000), at(60_000)).compute.runtime_ms, 3_000 + 10_000);
    }

    #[test]
    fn a_clock_that_is_put_back_takes_nothing_away() {
        let mut ledger = Ledger::default();
        ledger.saves(at(10_000), saved(1));
        ledger.saves(at(4_000), saved(2));
        assert_eq!(ledger.over(at(0), at(20_000), at(20_000)).saved.exclusive, 20_000);
        ledger.began("one", at(10_000), 1, 1);
        ledger.ended(Some(1_000));
        ledger.began("two", at(9_000), 1, 1);
        ledger.ended(Some(1_000));
        assert_eq!(ledger.over(at(0), at(20_000), at(20_000)).compute.runtime_ms, 2_000);
    }

    /// Against a plain list of all that was told, over random histories.
    #[test]
    fn any_history_adds_up_and_stays_bounded() {
        for seed in 1..200_u64 {
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut random = |below: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % below
            };
            let (mut ledger, mut now) = (Ledger::default(), 0_i64);
            let (mut sessions, mut runtime, mut vcpu, mut bytes, mut byte_ms) = (0, 0, 0, 0, 0_u128);
            for _ in 0..400 {
                let (step, ran) = (random(5_000) as i64, random(3_000));
                byte_ms += u128::from(bytes) * step as u128;
                now += step;
                if random(2) == 0 {
                    bytes = random(1 << 40);
                    ledger.saves(at(now), saved(bytes));
                } else {
                    let cpus = 1 + random(4);
                    ledger.began("x", at(now), cpus as u32, 1);
                    byte_ms += u128::from(bytes) * u128::from(ran);
                    now += ran as i64;
                    ledger.ended(Some(ran));
                    (sessions, runtime, vcpu) = (sessions + 1, runtime + ran, vcpu + ran * cpus);
                }
            }
            let used = ledger.over(at(0), at(now), at(now));
            assert_eq!((used.sessions, used.compute.runtime_ms, used.compute.vcpu_ms), (sessions, runtime, vcpu));
            // A mean is rounded by half a byte at most, each time two levels become one.
            let off = used.saved.exclusive.abs_diff(byte_ms);
            assert!(off <= now as u128 * 200, "{off} of {byte_ms}");
            assert!(ledger.runs.len() <= MAX_SESSIONS && ledger.levels.len() <= MAX_LEVELS);
            // Any cut gives two parts of the whole; runs that are not told apart any more are cut evenly.
            let cut = random(now as u64) as i64;
            let mut parts = ledger.over(at(0), at(cut), at(now));
            parts.add(ledger.over(at(cut), at(now), at(now)));
            assert_eq!(parts.saved, used.saved);
            assert!(parts.compute.runtime_ms.abs_diff(runtime) <= 2);
        }
    }
}
