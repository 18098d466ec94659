//! What a running guest says of its load, from its kernel's own files. Looking starts no session, and is no use of the
//! sandbox. A guest can say what it likes: figures are for people, nothing is decided by them.

use std::time::Duration;

use vmm::Agent;

use super::Engine;
use super::error::Result;
use super::session::within;

/// Longest of these files that is read.
const FILE_BYTES: usize = 64 << 10;
/// What `/proc/diskstats` counts in.
const SECTOR: u64 = 512;

/// Of one moment; none of what the guest does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Vitals {
    /// Processor time spent not idle since the guest booted, of all processors.
    pub cpu_busy: Option<Duration>,
    /// Mean number of runnable tasks over a minute.
    pub load: Option<f64>,
    /// Memory that its kernel has.
    pub memory_bytes: Option<u64>,
    /// Of that, what programs and the kernel hold and could not give up.
    pub memory_used_bytes: Option<u64>,
    /// Read from the root disk.
    pub disk_read_bytes: Option<u64>,
    /// Written to the root disk.
    pub disk_written_bytes: Option<u64>,
    /// Received by all interfaces but the loopback.
    pub received_bytes: Option<u64>,
    /// Sent by them.
    pub sent_bytes: Option<u64>,
    /// Since the guest booted.
    pub uptime: Option<Duration>,
}

impl Engine {
    /// What the guest says now; none if there is no session.
    pub async fn vitals(&self, key: &str) -> Result<Option<Vitals>> {
        let sandbox = self.find(key)?;
        let Some(agent) = super::commands::agent_of(&sandbox).await else { return Ok(None) };
        let deadline = self.shared.settings.agent_deadline;
        let read = async { Ok(read(&agent).await) };
        within(deadline, "asking the guest for its load", read).await.map(Some)
    }
}

async fn read(agent: &Agent) -> Vitals {
    let text = async |path: &str| -> String {
        let whole = match agent.read_file(path).await {
            Ok(reader) => reader.read_to_end(FILE_BYTES).await,
            Err(error) => Err(error),
        };
        whole.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    };
    let (stat, load, memory, disks, network, uptime) = tokio::join!(
        text("/proc/stat"),
        text("/proc/loadavg"),
        text("/proc/meminfo"),
        text("/proc/diskstats"),
        text("/proc/net/dev"),
        text("/proc/uptime")
    );
    let seconds =
        |text: &str| text.split_whitespace().next()?.parse::<f64>().ok().filter(|s| s.is_finite() && *s >= 0.0);
    let total = field(&memory, "MemTotal:");
    let (received, sent) = traffic(&network).unzip();
    let (disk_read, disk_written) = sectors(&disks).unzip();
    Vitals {
        cpu_busy: busy(&stat),
        load: seconds(&load),
        memory_bytes: total,
        memory_used_bytes: total.zip(field(&memory, "MemAvailable:")).map(|(all, free)| all.saturating_sub(free)),
        disk_read_bytes: disk_read,
        disk_written_bytes: disk_written,
        received_bytes: received,
        sent_bytes: sent,
        uptime: seconds(&uptime).and_then(|s| Duration::try_from_secs_f64(s).ok()),
    }
}

/// `cpu user nice system idle iowait …`, in hundredths of a second.
fn busy(stat: &str) -> Option<Duration> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).take(8).collect();
    let all: u64 = ticks.iter().fold(0, |sum, n| sum.saturating_add(*n));
    let idle = ticks.get(3)?.saturating_add(ticks.get(4).copied().unwrap_or(0));
    Some(Duration::from_millis(all.saturating_sub(idle).saturating_mul(10)))
}

/// `MemTotal:  12345 kB`
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1_024)
}

/// `eth0: bytes packets errs drop fifo frame compressed multicast bytes …`, of all but the loopback.
fn traffic(dev: &str) -> Option<(u64, u64)> {
    let lines = dev.lines().filter_map(|line| line.split_once(':')).filter(|(name, _)| name.trim() != "lo");
    let figures = lines.filter_map(|(_, rest)| {
        let words: Vec<&str> = rest.split_whitespace().collect();
        Some((words.first()?.parse::<u64>().ok()?, words.get(8)?.parse::<u64>().ok()?))
    });
    figures.reduce(|a, b| (a.0.saturating_add(b.0), a.1.saturating_add(b.1)))
}

/// `major minor vda reads merged sectors ms writes merged sectors …`, of the first virtio disk.
fn sectors(diskstats: &str) -> Option<(u64, u64)> {
    let words = diskstats.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let root = words.into_iter().find(|words| words.get(2) == Some(&"vda"))?;
    let bytes = |at: usize| root.get(at)?.parse::<u64>().ok()?.checked_mul(SECTOR);
    Some((bytes(5)?, bytes(9)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kernels_write_is_understood_and_nonsense_is_nothing() {
        let stat = "cpu  100 5 50 1000 20 1 2 3 0 0\ncpu0 1 1 1 1\n";
        assert_eq!(busy(stat), Some(Duration::from_millis(1_610)));
        assert_eq!(field("MemTotal:     1000 kB\nMemAvailable: 400 kB\n", "MemAvailable:"), Some(409_600));
        let dev = "Inter-| Receive\n face |bytes\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  eth0: 70 1 0 0 0 0 0 0 30 1 0 0 0 0 0 0\n";
        assert_eq!(traffic(dev), Some((70, 30)));
        let disks = " 254 16 vdb 1 1 1 1 1 1 1\n 254 0 vda 10 0 8 5 20 0 16 5 0 0 0\n";
        assert_eq!(sectors(disks), Some((4_096, 8_192)));
        for text in ["", "cpu \n", "MemTotal: x kB", "eth0: 1", "1 2 vda 3", "cpu 99999999999999999999999 1 1 1"] {
            let nothing = (busy(text), field(text, "MemTotal:"), traffic(text), sectors(text));
            assert_eq!(nothing, (None, None, None, None), "{text:?}");
        }
    }
}
