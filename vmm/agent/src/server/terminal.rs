//! Pseudo-terminals: the agent's end of them, and how a program gets the other.

use std::fs::File;
use std::io::Result;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};

use crate::wire::TerminalSize;

nix::ioctl_write_ptr_bad!(
    /// Sets a terminal's size, and tells its foreground group.
    set_size, libc::TIOCSWINSZ, libc::winsize
);

/// The master end. The terminal hangs up when the last one of it is closed.
pub(super) struct Terminal {
    master: OwnedFd,
    /// Where the other end is.
    path: String,
}

impl Terminal {
    /// A new terminal. No descriptor of it is inherited by a program that is started meanwhile.
    pub(super) fn open(size: TerminalSize) -> Result<Terminal> {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname_r(&master)?;
        let terminal = Terminal { master: master.into(), path };
        terminal.resize(size);
        Ok(terminal)
    }

    /// Makes it the program's input and outputs.
    pub(super) fn attach(&self, command: &mut Command, uid: u32) -> Result<()> {
        let other = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&self.path)?;
        // So that the program can open /dev/tty's own name again, as script and tmux do. Not allowed to others than root.
        let _ = std::os::unix::fs::fchown(&other, Some(uid), None);
        command.stdin(other.try_clone()?).stdout(other.try_clone()?).stderr(other);
        Ok(())
    }

    pub(super) fn resize(&self, size: TerminalSize) {
        let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open during the call and the size a valid structure. It cannot fail on a terminal.
        let _ = unsafe { set_size(self.master.as_raw_fd(), &size) };
    }

    /// The process group that has the terminal now.
    pub(super) fn foreground(&self) -> Option<libc::pid_t> {
        nix::unistd::tcgetpgrp(&self.master).ok().map(nix::unistd::Pid::as_raw).filter(|group| *group > 1)
    }

    pub(super) fn again(&self) -> Result<Terminal> {
        Ok(Terminal { master: self.master.try_clone()?, path: self.path.clone() })
    }

    /// One to read from, one to write to.
    pub(super) fn ends(self) -> Result<(OwnedFd, OwnedFd)> {
        let read = self.master.try_clone()?;
        Ok((read, self.master))
    }
}
