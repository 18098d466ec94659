//! Whether KVM works here, found out by booting a guest with it once.
//!
//! That `/dev/kvm` opens says little: a nested or paravirtual KVM may hang or abort on a stock kernel. So the very kernel
//! and initramfs that machines get are booted with a small disk until the guest's agent answers, under a deadline. The
//! answer is kept as long as the kernel, the host's kernel and processor and QEMU stay the same; deleting its file asks
//! again.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::QemuVmm;
use crate::{Accel, Acceleration, DiskAttachment, Error, ErrorKind, MachineSpec, Network, Result, Vmm, image};

/// Name of the answer's file.
const ANSWER: &str = "kvm-probe.json";
/// Many times what a boot with working KVM takes, and less than people wait for in silence.
const DEADLINE: Duration = Duration::from_secs(20);
/// Enough for an ext4 file system.
const DISK_BYTES: u64 = 8 << 20;

/// What was found, and for what.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Answer {
    kernel_blake3: String,
    host: String,
    processor: String,
    vmm: String,
    works: bool,
    /// For people.
    found: String,
}

pub(super) async fn kvm(
    vmm: &QemuVmm,
    kernel: &Path,
    initramfs: &Path,
    run_root: &Path,
    cache_dir: &Path,
) -> Acceleration {
    let tcg = |reason: String| Acceleration { accel: Accel::Tcg, reason };
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        // Costs nothing to find out, so nothing is kept.
        return tcg(format!("/dev/kvm cannot be opened: {error}"));
    }
    let asked = match question(vmm, kernel).await {
        Ok(asked) => asked,
        Err(error) => return tcg(format!("KVM was not tried: {error}")),
    };
    let file = cache_dir.join(ANSWER);
    let known = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Answer>(&bytes).ok());
    let answer = match known {
        Some(known) if known.is_about(&asked) => known,
        _ => {
            let (works, found) = match boot(vmm, kernel, initramfs, run_root).await {
                Ok(ms) => (true, format!("a guest booted with KVM in {ms} ms")),
                // Of the machine's making: it would be the same again.
                Err(error) if matches!(error.kind, ErrorKind::BootTimeout | ErrorKind::StartFailed) => {
                    (false, format!("a guest did not boot with KVM within {} s: {error}", DEADLINE.as_secs()))
                }
                Err(error) => return tcg(format!("KVM could not be tried: {error}")),
            };
            let answer = Answer { works, found, ..asked };
            keep(&file, &answer);
            answer
        }
    };
    let accel = if answer.works { Accel::Kvm } else { Accel::Tcg };
    Acceleration { accel, reason: format!("{} (kept in {})", answer.found, file.display()) }
}

impl Answer {
    fn is_about(&self, other: &Answer) -> bool {
        (&self.kernel_blake3, &self.host, &self.processor, &self.vmm)
            == (&other.kernel_blake3, &other.host, &other.processor, &other.vmm)
    }
}

/// An answer without what is to be found.
async fn question(vmm: &QemuVmm, kernel: &Path) -> Result<Answer> {
    let version = vmm.version().await?;
    let kernel = kernel.to_owned();
    super::blocking(move || {
        let bytes = std::fs::read(&kernel).map_err(|e| Error::io(kernel.display(), e))?;
        let (host, processor) = this_host().map_err(|e| Error::io("uname", e))?;
        Ok(Answer {
            kernel_blake3: blake3::hash(&bytes).to_hex().to_string(),
            host,
            processor,
            vmm: version,
            works: false,
            found: String::new(),
        })
    })
    .await
}

/// Kernel and processor.
pub(super) fn this_host() -> nix::Result<(String, String)> {
    let host = nix::sys::utsname::uname()?;
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let kernel = format!("{} {}", host.release().to_string_lossy(), host.version().to_string_lossy());
    Ok((kernel, model.map_or("unknown", |(_, name)| name.trim()).to_owned()))
}

/// What was found out about KVM, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmAnswer {
    /// A guest booted with it.
    pub works: bool,
    /// What was seen.
    pub found: String,
    /// The host's kernel, processor or QEMU is another by now: it is asked again.
    pub outdated: bool,
    /// Where it is kept; deleting that asks again.
    pub file: std::path::PathBuf,
}

/// What is kept in `cache_dir` about KVM, if it was ever tried. `qemu` is the first line of QEMU's version now. Tries
/// nothing.
pub fn kept_kvm_answer(cache_dir: &Path, qemu: &str) -> Option<KvmAnswer> {
    let file = cache_dir.join(ANSWER);
    let kept: Answer = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
    let now = this_host().ok()?;
    let outdated = (&kept.host, &kept.processor, kept.vmm.as_str()) != (&now.0, &now.1, qemu);
    Some(KvmAnswer { works: kept.works, found: kept.found, outdated, file })
}

/// Boots a guest with KVM; how long that took, in milliseconds.
async fn boot(vmm: &QemuVmm, kernel: &Path, initramfs: &Path, run_root: &Path) -> Result<u64> {
    tracing::info!("trying KVM: a guest is booted once");
    // Among the machines, so that the next daemon finds what this one leaves if it dies.
    let run_dir = run_root.join("kvm-probe");
    let (disk, made) = (run_dir.join("disk"), run_dir.clone());
    super::blocking(move || {
        let io = |e| Error::io(made.display(), e);
        let (tree, disk) = (made.join("tree"), made.join("disk"));
        std::fs::create_dir_all(&tree).map_err(io)?;
        std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).map_err(io)?;
        let (uuid, seed) = ("00000000-0000-4000-8000-00000000006b", "00000000-0000-4000-8000-00000000006d");
        image::make_ext4(&tree, &disk, uuid, seed, None)
    })
    .await?;
    let spec = MachineSpec {
        id: format!("kvm-probe-{:08x}", rand::random::<u32>()),
        run_dir: run_dir.clone(),
        cpus: 1,
        memory_mib: 128,
        kernel: kernel.to_owned(),
        initramfs: initramfs.to_owned(),
        disk: DiskAttachment::RawFile { path: disk },
        volumes: Vec::new(),
        accel: Accel::Kvm,
        hostname: "kvm-probe".into(),
        network: Network::None,
        mac: [2, 0, 0, 0, 0, 1],
        kernel_args: Vec::new(),
        warm: None,
    };
    let booted = match vmm.start(spec, DEADLINE).await {
        Ok(machine) => machine.kill().await.map(|_| machine.boot_timing().agent_ms),
        Err(error) => Err(error),
    };
    let _ = std::fs::remove_dir_all(&run_dir);
    booted
}

fn keep(file: &Path, answer: &Answer) {
    let written = serde_json::to_vec_pretty(answer).map_err(std::io::Error::from).and_then(|bytes| {
        let temporary = file.with_extension("tmp");
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(&temporary, file)
    });
    if let Err(error) = written {
        tracing::warn!(file = %file.display(), %error, "what was found about KVM is not kept; it is asked again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_answer_is_told_and_is_outdated_on_another_host() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(kept_kvm_answer(dir.path(), "QEMU 7"), None);
        let (host, processor) = this_host().unwrap();
        let file = dir.path().join(ANSWER);
        let (vmm, found) = ("QEMU 7".to_owned(), "a guest booted".to_owned());
        keep(&file, &Answer { kernel_blake3: String::new(), host, processor, vmm, works: true, found: found.clone() });
        let answer = KvmAnswer { works: true, found, outdated: false, file: file.clone() };
        assert_eq!(kept_kvm_answer(dir.path(), "QEMU 7"), Some(answer.clone()));
        assert_eq!(kept_kvm_answer(dir.path(), "QEMU 8"), Some(KvmAnswer { outdated: true, ..answer }));
        std::fs::write(&file, "{").unwrap();
        assert_eq!(kept_kvm_answer(dir.path(), "QEMU 7"), None, "half an answer is none");
    }
}
