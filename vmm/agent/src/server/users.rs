//! Users of the guest, from its `/etc/passwd` and `/etc/group`: the C library's look-ups need shared libraries.

use super::System;
use crate::wire::{AgentError, ErrorKind};

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
    pub(super) shell: String,
}

/// The user called `wanted` (a name or a number; root without).
pub(super) fn find(system: &dyn System, wanted: Option<&str>) -> Result<User, AgentError> {
    let read = |path| {
        let bytes = system.path(path).ok().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    lookup(&read("/etc/passwd"), &read("/etc/group"), wanted.unwrap_or("root")).ok_or_else(|| {
        AgentError::new(ErrorKind::NotFound, format!("no user {:?} in the guest", wanted.unwrap_or("root")))
    })
}

fn lookup(passwd: &str, group: &str, wanted: &str) -> Option<User> {
    let uid = wanted.parse::<u32>().ok();
    let listed = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let &[name, _, id, gid, _, home, shell, ..] = fields.as_slice() else { return None };
        let id = id.parse().ok()?;
        let hit = name == wanted || uid == Some(id);
        let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
        hit.then_some(User {
            name: name.to_owned(),
            uid: id,
            gid: gid.parse().ok()?,
            groups: Vec::new(),
            home: or(home, "/"),
            shell: or(shell, "/bin/sh"),
        })
    });
    let unlisted = |uid: u32| User {
        name: if uid == 0 { "root".into() } else { uid.to_string() },
        uid,
        gid: uid,
        groups: Vec::new(),
        home: if uid == 0 { "/root".into() } else { "/".into() },
        shell: "/bin/sh".into(),
    };
    // A root without a passwd file is still root, and a number needs no entry.
    let uid = uid.or((wanted == "root").then_some(0));
    let mut user = listed.or_else(|| uid.filter(|uid| *uid != u32::MAX).map(unlisted))?;
    user.groups = group
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let (gid, members) = (fields.nth(2)?, fields.next()?);
            members.split(',').any(|member| member == user.name).then(|| gid.parse().ok())?
        })
        .chain([user.gid])
        .collect();
    Some(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nbox:x:1000:1000::/home/box:\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:syslog,box\nbox:x:1000:\n";

    #[test]
    fn names_and_numbers_are_found() {
        let user = lookup(PASSWD, GROUP, "box").unwrap();
        assert_eq!((user.uid, user.gid, user.shell.as_str()), (1000, 1000, "/bin/sh"));
        assert_eq!(user.groups, [4, 1000]);
        assert_eq!(lookup(PASSWD, GROUP, "1000"), Some(user));
        assert_eq!(lookup(PASSWD, GROUP, "4242").unwrap().uid, 4242);
        assert_eq!(lookup(PASSWD, GROUP, "nobody"), None);
        assert_eq!(lookup("", "", "root").unwrap().home, "/root");
    }
}
