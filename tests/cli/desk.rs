//! Somebody at a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// So that a hang ends, in milliseconds; far more than anything takes.
const PATIENCE: u32 = 300_000;

nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, Winsize);

/// The program at a terminal.
pub struct Desk {
    pub child: Child,
    screen: File,
    /// Keeps the terminal, and says in what mode it is.
    terminal: OwnedFd,
    pub seen: String,
}

impl Desk {
    pub fn sit(command: &mut Command) -> Desk {
        let pty = openpty(&Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 }, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        // The command keeps its ends otherwise.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Desk { child, screen: File::from(pty.master), terminal: pty.slave, seen: String::new() }
    }

    pub fn until(&mut self, what: &str) {
        let mut bytes = [0; 4096];
        while !self.seen.contains(what) {
            let mut screen = [PollFd::new(self.screen.as_fd(), PollFlags::POLLIN)];
            assert_eq!(
                poll(&mut screen, PollTimeout::try_from(PATIENCE).unwrap()).unwrap(),
                1,
                "waited in vain for {what:?}: {}",
                self.seen
            );
            let len = self.screen.read(&mut bytes).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
    }

    /// Starts a program at the shell there, and interrupts it with the key for that.
    pub fn interrupt_a_program(&mut self) {
        self.type_in(
            "sh -c 'trap \"echo caught $((6 * 7)); exit\" INT; echo up $((6 * 7)); while :; do sleep 0.1; done'\n",
        );
        self.until("up 42");
        self.type_in("\u{3}");
        self.until("caught 42");
    }

    /// Its exit code; what it writes meanwhile is not looked at.
    pub fn ended(&mut self) -> Option<i32> {
        let until = Instant::now() + Duration::from_millis(PATIENCE.into());
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "waited in vain for the end: {}", self.seen);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn type_in(&mut self, text: &str) {
        self.screen.write_all(text.as_bytes()).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn resize(&self, rows: u16, cols: u16) {
        let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and the size a valid structure.
        unsafe { set_size(self.terminal.as_raw_fd(), &size) }.unwrap();
        // The kernel tells the terminal's own session, which the program is not in here.
        self.signal(Signal::SIGWINCH);
    }

    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_flags.contains(LocalFlags::ICANON)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
