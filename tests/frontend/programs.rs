//! Programs of the host, run to their end.

use std::process::{Command, Output, Stdio};

/// Runs a program to its end. Fails with its output unless it succeeds.
pub fn run(program: &str, args: &[&str]) -> Output {
    done(program, Command::new(program).args(args))
}

/// The same of a command.
pub fn done(what: &str, command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("this test needs {what}: {e}"));
    assert!(
        output.status.success(),
        "{what}: {}\n{command:?}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
