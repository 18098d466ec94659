//! Boots a guest several times and says how long it took, by machine type:
//! `cargo run --release -p vmm --example boot -- KERNEL INITRAMFS DISK TIMES MACHINE...`
//!
//! The types take turns, so that whatever else the host does meets them alike. The disk is written to.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm::{Accel, DiskAttachment, MachineSpec, Network, QemuVmm, Vmm};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, disk, times, machines @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS DISK TIMES MACHINE...".into());
    };
    let dir = tempfile::tempdir()?;
    for _ in 0..times.parse::<u32>()? {
        for machine_type in machines {
            let spec = MachineSpec {
                id: "boot".into(),
                run_dir: dir.path().join("run"),
                cpus: 1,
                memory_mib: 256,
                kernel: PathBuf::from(kernel),
                initramfs: PathBuf::from(initramfs),
                disk: DiskAttachment::RawFile { path: PathBuf::from(disk) },
                volumes: Vec::new(),
                accel: Accel::Tcg,
                hostname: "boot".into(),
                network: Network::User,
                mac: [2, 0, 0, 0, 0, 1],
                kernel_args: Vec::new(),
                warm: None,
            };
            let machine = QemuVmm::new().machine_type(machine_type).start(spec, PATIENCE).await?;
            let timing = machine.boot_timing();
            let guest_ms = machine.agent().ping().await?.uptime_ms;
            let stopping = Instant::now();
            let reason = machine.shutdown(PATIENCE).await?;
            let stop_ms = stopping.elapsed().as_millis();
            let (process_ms, agent_ms) = (timing.process_ms, timing.agent_ms);
            println!(
                "{machine_type}: process {process_ms} ms, agent {agent_ms} ms (guest's own clock {guest_ms} ms), shutdown {stop_ms} ms ({reason:?})"
            );
        }
    }
    Ok(())
}
