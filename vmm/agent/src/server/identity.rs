//! Being one sandbox and no other. A disk is often a copy of another sandbox's; what two machines must not share is made
//! anew when the disk's machine id is not the one this sandbox has, and left alone otherwise.

use std::fs;
use std::io::{Error, ErrorKind as Io, Result, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::System;
use super::files::{Temporary, make_parents};
use crate::wire::{AgentError, ErrorKind, Identity, Reply};

const MACHINE_ID: &str = "/etc/machine-id";
const SSH: &str = "/etc/ssh";
/// The address by which Debian knows a machine of its own name.
const OWN_ADDRESS: &str = "127.0.1.1";

pub(super) fn check_hostname(name: &str) -> std::result::Result<(), AgentError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
        return Err(AgentError::new(ErrorKind::Invalid, "a host name is 1-64 of a-z, 0-9, '-' and '.'"));
    }
    Ok(())
}

pub(super) fn set_hostname(system: &dyn System, name: &str) -> std::result::Result<(), AgentError> {
    check_hostname(name)?;
    system.set_hostname(name)
}

/// Of the disk, the machine id is written last: what is cut off before is done again at the next start.
pub(super) fn assume(system: &dyn System, identity: &Identity) -> std::result::Result<Reply, AgentError> {
    let id = &identity.machine_id;
    if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(AgentError::new(ErrorKind::Invalid, "a machine id has 32 hexadecimal digits"));
    }
    set_hostname(system, &identity.hostname)?;
    system.set_clock(identity.unix_nanos)?;
    system.add_entropy(&identity.entropy)?;
    if let Some(mac) = identity.mac {
        system.set_mac(mac)?;
    }
    let present = fs::read_to_string(system.path(MACHINE_ID)?).unwrap_or_default();
    let fresh = present.trim() != id;
    if fresh {
        let failed = |what: &'static str| move |e: Error| AgentError::io(what, &e);
        remove_host_keys(&system.path(SSH)?).map_err(failed("remove ssh host keys"))?;
        remove(&system.path("/var/lib/systemd/random-seed")?).map_err(failed("remove the random seed"))?;
        let hostname = &identity.hostname;
        put(&system.path("/etc/hostname")?, &format!("{hostname}\n"), 0o644).map_err(failed("write /etc/hostname"))?;
        let hosts = system.path("/etc/hosts")?;
        let text = with_own_name(&fs::read_to_string(&hosts).unwrap_or_default(), hostname);
        put(&hosts, &text, 0o644).map_err(failed("write /etc/hosts"))?;
        // Mostly a link to the other; where it is a file it must say the same.
        let dbus = system.path("/var/lib/dbus/machine-id")?;
        if fs::symlink_metadata(&dbus).is_ok_and(|meta| meta.is_file()) {
            put(&dbus, &format!("{id}\n"), 0o444).map_err(failed("write the machine id"))?;
        }
        let path = system.path(MACHINE_ID)?;
        let machine_id = prepare(&path, &format!("{id}\n"), 0o444).map_err(failed("write the machine id"))?;
        // One wait for all of them.
        system.sync();
        machine_id.put_at(&path).map_err(failed("write the machine id"))?;
    }
    if identity.woken {
        // Last: programs connect anew at once, and are to do so as who they are now.
        system.end_connections();
    }
    let server = system.path("/usr/sbin/sshd")?.exists();
    let host_keys_missing = server && host_keys(&system.path(SSH)?).is_ok_and(|keys| keys.is_empty());
    Ok(Reply::Identified { fresh, host_keys_missing })
}

/// The text of `/etc/hosts` with this name for the machine's own address.
fn with_own_name(hosts: &str, hostname: &str) -> String {
    let mut lines: Vec<String> = hosts.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"].map(str::to_owned).to_vec();
    }
    let own = |line: &String| line.split_whitespace().next() == Some(OWN_ADDRESS);
    let at = lines.iter().position(own).unwrap_or(1.min(lines.len()));
    lines.retain(|line| !own(line));
    lines.insert(at.min(lines.len()), format!("{OWN_ADDRESS} {hostname}"));
    lines.join("\n") + "\n"
}

fn host_keys(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == Io::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut keys = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub")) {
            keys.push(path);
        }
    }
    Ok(keys)
}

fn remove_host_keys(dir: &Path) -> Result<()> {
    host_keys(dir)?.iter().try_for_each(|key| remove(key))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == Io::NotFound => Ok(()),
        done => done,
    }
}

/// Puts a small file in place; it is durable once all that was written is. A link is replaced by the file.
fn put(path: &Path, text: &str, mode: u32) -> Result<()> {
    prepare(path, text, mode)?.put_at(path)
}

/// A small file that is still to be put in place.
fn prepare(path: &Path, text: &str, mode: u32) -> Result<Temporary> {
    if let Some(parent) = path.parent() {
        make_parents(parent)?;
    }
    let temporary = Temporary::beside(path)?;
    (&temporary.file).write_all(text.as_bytes())?;
    temporary.file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(temporary)
}

#[cfg(test)]
mod tests {
    use super::with_own_name;

    #[test]
    fn a_name_takes_the_place_of_the_one_before() {
        let debian = "127.0.0.1 localhost\n127.0.1.1 old old.local\n10.0.0.1 other\n";
        assert_eq!(with_own_name(debian, "new"), "127.0.0.1 localhost\n127.0.1.1 new\n10.0.0.1 other\n");
        assert_eq!(with_own_name("127.0.0.1 localhost", "a"), "127.0.0.1 localhost\n127.0.1.1 a\n");
        assert!(with_own_name("", "a").contains("127.0.0.1 localhost\n127.0.1.1 a\n"));
    }
}
