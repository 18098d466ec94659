//! What was used over time, as users ask for it.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::Daemon;

fn ok(d: &Daemon, args: &[&str]) -> Value {
    d.run(&[&["--json"], args].concat()).json()
}

/// The line of a sandbox, after everything was looked at.
fn line(d: &Daemon, id: &str) -> Value {
    let report = ok(d, &["usage", "--period", "1h", "--measure"]);
    let lines = report["results"].as_array().unwrap();
    lines.iter().find(|r| r["sandbox_id"] == id).unwrap_or_else(|| panic!("{id} is not in {report}")).clone()
}

#[test]
fn compute_moves_to_saved_state_and_survives_kill_9() {
    let mut d = Daemon::start();
    let id = ok(&d, &["sandbox", "create", "--name", "web", "--cpu", "3", "--memory", "512mb", "--wait"])["id"].clone();
    let id = id.as_str().unwrap();
    let now = line(&d, id);
    assert_eq!((&now["state"], &now["sessions"]), (&json!("running"), &json!(1)), "{now}");
    assert!(now["runtime_sec"].as_f64().unwrap() > 0.0, "{now}");
    assert_eq!(now["saved"]["logical_bytes"], 64 * 4096);

    ok(&d, &["sandbox", "stop", "web"]);
    let sessions = ok(&d, &["usage", "web", "--sessions"]);
    let session = &sessions[0];
    assert_eq!((sessions.as_array().unwrap().len(), &session["status"]), (1, &json!("ended")), "{sessions}");
    assert_eq!((&session["cpu_count"], &session["memory_mb"]), (&json!(3), &json!(512)));
    let at_rest = line(&d, id);
    assert_eq!(at_rest["runtime_sec"], session["runtime_sec"]);
    assert_eq!(at_rest["vcpu_sec"].as_f64().unwrap(), session["provisioned_vcpu_ms"].as_f64().unwrap() / 1_000.0);
    // Time goes on for what is saved, and for nothing else.
    let later = line(&d, id);
    assert_eq!(later["runtime_sec"], at_rest["runtime_sec"]);
    assert!(later["logical_byte_hours"].as_f64() > at_rest["logical_byte_hours"].as_f64(), "{later}");

    // What is durable is there after a death, and a session that it cut off has an end.
    ok(&d, &["sandbox", "resume", "web"]);
    d.end(Signal::SIGKILL);
    d.start_again();
    let running = ok(&d, &["sandbox", "show", "web"])["state"] == "running";
    let sessions = ok(&d, &["sandbox", "usage", "web", "--sessions"]);
    assert_eq!(sessions.as_array().unwrap().len(), 2, "{sessions}");
    assert_eq!(sessions[0], *session);
    assert_eq!(sessions[1]["status"], if running { "running" } else { "ended" }, "{sessions}");
    let after = line(&d, id);
    assert_eq!(after["sessions"], 2);
    assert!(after["logical_byte_hours"].as_f64() > later["logical_byte_hours"].as_f64(), "{after}");

    // A snapshot outlives its sandbox, and is kept on its account.
    ok(&d, &["sandbox", "snapshot", "web", "--name", "kept"]);
    ok(&d, &["sandbox", "destroy", "web"]);
    let gone = line(&d, id);
    assert_eq!((&gone["state"], &gone["saved"]["logical_bytes"]), (&json!("destroyed"), &json!(64 * 4096)), "{gone}");
    ok(&d, &["sandbox", "snapshots", "delete", "kept"]);
    assert_eq!(line(&d, id)["saved"]["logical_bytes"], 0);

    let shown = d.run(&["usage"]);
    assert!(shown.out.contains("web") && shown.out.contains("destroyed"), "{shown:?}");
    let shown = d.run(&["usage", id, "--sessions"]);
    assert!(shown.out.contains("3 cpu, 512 MiB") && !shown.out.contains("running"), "{shown:?}");
}

#[test]
fn periods_are_checked() {
    let d = Daemon::start();
    for (args, code) in [
        (&["--period", "long"][..], "invalid_input"),
        (&["--start", "yesterday"], "invalid_input"),
        (&["--start", "2026-01-02T00:00:00Z", "--end", "2026-01-01T00:00:00Z"], "invalid_input"),
        (&["none"], "sandbox_not_found"),
    ] {
        assert_eq!(d.run(&[&["--json", "usage"], args].concat()).error(1)["code"], code, "{args:?}");
    }
    let empty = ok(&d, &["usage", "--start", "2020-01-01T00:00:00Z", "--end", "2020-02-01T00:00:00Z"]);
    assert_eq!((&empty["results"], &empty["total"]["runtime_sec"]), (&json!([]), &json!(0.0)));
    assert!(d.run(&["usage"]).out.contains("nothing was used"));
}
