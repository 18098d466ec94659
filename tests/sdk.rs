//! The public Python SDK, as it is on PyPI, against a daemon on a TCP address; and its document against what it serves.
//!
//! What is called is in `sdk/story.py`. Packages are installed once, into the cache directory.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

#[path = "cli/support.rs"]
#[allow(dead_code, reason = "the command line's tests use more of it")]
mod support;

use support::Daemon;

const SDK: &str = "miosa[events]==2.19.2";
const SCHEMATHESIS: &str = "schemathesis==4.32.5";

/// A Python that has this package and what it needs.
fn python(package: &str) -> PathBuf {
    let cache = std::env::var_os("MIOSA_CACHE_DIR").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::home_dir().unwrap().join(".cache/miosa"));
    let dir = cache.join("python").join(package.replace("==", "-"));
    std::fs::create_dir_all(dir.parent().unwrap()).unwrap();
    // Two runs at a time would install into each other.
    let lock = std::fs::File::create(dir.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let done = dir.join("installed");
    if !done.exists() {
        let _ = std::fs::remove_dir_all(&dir);
        succeed(Command::new("python3").args(["-m", "venv"]).arg(&dir));
        succeed(Command::new(dir.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", package]));
        std::fs::write(&done, "").unwrap();
    }
    dir.join("bin")
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

/// A daemon, its address, and its key.
fn start() -> (Daemon, String, String) {
    let d = Daemon::start_with(&["--listen", "127.0.0.1:0"]);
    let log = d.log();
    let at = log.find("127.0.0.1:").expect("the address in the log");
    let address = log[at..].split_whitespace().next().unwrap().to_owned();
    let key = std::fs::read_to_string(d.dir.path().join("api-key")).unwrap().trim().to_owned();
    (d, format!("http://{address}"), key)
}

#[test]
fn the_public_sdk_works_unchanged() {
    let bin = python(SDK);
    let (d, url, key) = start();
    let story = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/story.py");
    let mut command = Command::new(bin.join("python"));
    command.arg(story).env("MIOSA_TEST_URL", url).env("MIOSA_TEST_KEY", key);
    let output = succeed(&mut command);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "the story is told\n", "{}", d.log());
}

/// As its description on PyPI prints it.
#[test]
fn the_sdks_quick_start_works() {
    let bin = python(SDK);
    let (d, url, key) = start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/quickstart.py");
    let mut command = Command::new(bin.join("python"));
    command.arg(script).env("MIOSA_TEST_URL", url).env("MIOSA_TEST_KEY", key);
    let output = succeed(&mut command);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "started quickly\n", "{}", d.log());
}

/// The table in `docs/api.md` is what happens. To write it anew: `MIOSA_UPDATE_DOCS=1`.
#[test]
fn what_becomes_of_each_call_is_as_written() {
    const BEGIN: &str = "<!-- written by tests/sdk.rs -->\n\n";
    let bin = python(SDK);
    let (d, url, key) = start();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(bin.join("python"));
    command.arg(root.join("tests/sdk/calls.py")).env("MIOSA_TEST_URL", url).env("MIOSA_TEST_KEY", key);
    let output = succeed(&mut command);
    let table = String::from_utf8(output.stdout).unwrap();
    let path = root.join("docs/api.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (text, written) = page.split_once(BEGIN).expect("the place of the table");
    if std::env::var_os("MIOSA_UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{text}{BEGIN}{}\n", table.trim_end())).unwrap();
        return;
    }
    assert_eq!(written.trim_end(), table.trim_end(), "docs/api.md; {}", d.log());
}

/// Requests made from the document, right and wrong ones: no answer is a failure of ours, and each is as documented.
#[test]
fn answers_are_as_the_document_says() {
    let bin = python(SCHEMATHESIS);
    let (d, url, key) = start();
    let mut command = Command::new(bin.join("schemathesis"));
    command.current_dir(d.dir.path()).env("PATH", std::env::var_os("PATH").unwrap()).args([
        "run",
        &format!("{url}/api/v1/openapi.json"),
        "--header",
        &format!("Authorization: Bearer {key}"),
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        // These answer with streams, work on all that is stored, or do on this machine what they are told.
        "--exclude-path-regex",
        "/stream$|/terminal$|/events$|/export$|/disk-imports$|/store/|/attach$|/exec$|/run$|/template/start$\
         |/sandbox-templates$|-archives$|/fs/archive$",
        "--phases",
        "coverage,fuzzing,stateful",
        "--max-examples",
        &std::env::var("MIOSA_FUZZ_EXAMPLES").unwrap_or_else(|_| "3".to_owned()),
        // Some wait as long as they are told, a minute at most.
        "--request-timeout",
        "100",
        "--seed",
        &std::env::var("MIOSA_FUZZ_SEED").unwrap_or_else(|_| "1".to_owned()),
        "--no-color",
    ]);
    succeed(&mut command);
}
