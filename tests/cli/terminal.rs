//! Terminals, as somebody at one meets them: the real program on a pseudo-terminal.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::desk::Desk;
use crate::support::{Daemon, miosa, run};

fn sit(d: &Daemon, args: &[&str]) -> Desk {
    Desk::sit(&mut miosa(d.dir.path(), args))
}

#[test]
fn a_shell_has_this_terminals_size_and_gives_the_terminal_back() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--no-start"]);
    let mut desk = sit(&d, &["sandbox", "shell", "web", "--env", "GREETING=hello"]);
    desk.type_in("stty size; echo $GREETING:$0\n");
    desk.until("33 101");
    desk.until("hello:-");
    assert!(desk.is_raw());
    desk.interrupt_a_program();
    desk.type_in("exit 9\n");
    assert_eq!(desk.ended(), Some(9));
    assert!(!desk.is_raw());
}

#[test]
fn a_resize_is_passed_on_and_the_escape_hangs_up() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let mut desk = sit(&d, &["sandbox", "shell", "web"]);
    desk.type_in("stty size; echo pid=$$:$((6 * 7))\n");
    desk.until(":42");
    assert!(desk.seen.contains("33 101"), "{}", desk.seen);
    let pid = desk.seen.rsplit_once("pid=").unwrap().1.split_once(':').unwrap().0.parse().unwrap();
    desk.resize(7, 17);
    desk.type_in("until [ \"$(stty size)\" = \"7 17\" ]; do :; done; echo seen $((6 * 7))\n");
    desk.until("seen 42");
    desk.type_in("~.");
    assert_eq!(desk.ended(), Some(129));
    assert!(!desk.is_raw());
    while kill(Pid::from_raw(pid), None).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_daemon_that_dies_gives_the_terminal_back() {
    let mut d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let mut desk = sit(&d, &["sandbox", "shell", "web"]);
    desk.type_in("echo $((6 * 7))\n");
    desk.until("42");
    d.end(Signal::SIGKILL);
    assert_eq!(desk.ended(), Some(2));
    assert!(!desk.is_raw());
    desk.until("connection");
}

#[test]
fn a_command_is_interrupted_by_the_first_signal_and_given_up_at_the_second() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let script = "trap 'echo caught; exit 7' INT; echo up; while :; do sleep 0.1; done";
    let mut desk = sit(&d, &["sandbox", "exec", "web", "--", "sh", "-c", script]);
    desk.until("up");
    desk.signal(Signal::SIGINT);
    assert_eq!(desk.ended(), Some(7));
    desk.until("caught");
    let mut desk = sit(&d, &["sandbox", "exec", "web", "--", "sh", "-c", "echo up; exec sleep 600"]);
    desk.until("up");
    desk.signal(Signal::SIGTERM);
    assert_eq!(desk.ended(), Some(128 + 15));
    let mut desk = sit(&d, &["sandbox", "exec", "web", "--", "sh", "-c", "trap '' INT; echo up; exec sleep 600"]);
    desk.until("up");
    desk.signal(Signal::SIGINT);
    // Two that come at once are one.
    while desk.child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(50));
        desk.signal(Signal::SIGINT);
    }
    assert_eq!(desk.ended(), Some(128 + 2));
}

#[test]
fn a_signal_that_ends_the_program_gives_the_terminal_back() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let mut desk = sit(&d, &["sandbox", "exec", "web", "--tty", "--interactive", "--", "sh", "-c", "echo up; cat"]);
    desk.until("up");
    assert!(desk.is_raw());
    desk.signal(Signal::SIGTERM);
    assert_eq!(desk.ended(), Some(143));
    assert!(!desk.is_raw());
}

#[test]
fn a_terminal_works_from_a_pipe_and_its_errors_are_told() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let piped = ["sandbox", "exec", "web", "--tty", "--", "sh", "-c", "read line; echo got $line; test -t 1; exit $?"];
    let ran = run(miosa(d.dir.path(), &piped), b"typed\n");
    assert!(ran.code == 0 && ran.out.contains("got typed"), "{ran:?}");
    let absent = run(miosa(d.dir.path(), &["sandbox", "shell", "none", "--json"]), b"");
    assert_eq!(absent.error(1)["code"], "sandbox_not_found");
    // The end comes at once, whoever is quicker.
    for _ in 0..20 {
        let absent = ["sandbox", "exec", "web", "--tty", "--json", "--", "no-such-program"];
        let program = run(miosa(d.dir.path(), &absent), b"");
        assert!(program.err.contains("command_not_found") || program.out.contains("command_not_found"), "{program:?}");
    }
}
