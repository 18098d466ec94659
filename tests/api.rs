//! The HTTP API over its socket, spoken by hand: shapes, statuses, bounds.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

#[path = "cli/support.rs"]
#[allow(dead_code, reason = "the command line's tests use more of it")]
mod support;

use support::Daemon;

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn data(&self) -> Value {
        assert!((200..300).contains(&self.status), "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()["data"].clone()
    }

    fn code(&self) -> String {
        let error = self.json()["error"].clone();
        let id = error["request_id"].as_str().unwrap();
        assert!(id.starts_with("req-") && self.head.contains(id), "{error} {}", self.head);
        error["code"].as_str().unwrap().to_owned()
    }
}

/// One request on one connection.
fn call(d: &Daemon, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
    let mut stream = UnixStream::connect(d.dir.path().join("miosa.sock")).unwrap();
    let head = format!(
        "{method} /api/v1{path} HTTP/1.0\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A body that is too large is refused before it is all there.
    let _ = stream.write_all(body);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").expect("an answer");
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: all[end + 4..].to_vec() }
}

fn get(d: &Daemon, path: &str) -> Answer {
    call(d, "GET", path, "application/json", b"")
}

fn post(d: &Daemon, path: &str, body: &Value) -> Answer {
    call(d, "POST", path, "application/json", body.to_string().as_bytes())
}

fn sandbox(d: &Daemon) -> String {
    let made = post(d, "/sandboxes?wait=true", &json!({ "template_id": "base", "name": "one" }));
    assert_eq!(made.status, 201);
    made.data()["id"].as_str().unwrap().to_owned()
}

/// What is neither an id nor a name, and would be a path if somebody made one of it.
const STRANGE: [&str; 16] = [
    "..",
    ".",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "%2fetc%2fpasswd",
    "..%2fstore",
    "..%2fapi-key",
    "%2e%2e%2fdaemon.lock",
    "a%2f..%2f..%2fx",
    "x%00y",
    "%00",
    "x%0ay",
    "%7e",
    "*",
    "%ff%fe",
    "..%5c..%5cx",
];

fn n_of_parameters(parts: &[&str]) -> usize {
    parts.iter().filter(|part| part.starts_with('{')).count()
}

#[test]
fn no_id_is_a_path() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let seen = |dir: &std::path::Path| {
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<std::collections::BTreeSet<_>>()
    };
    let state = d.dir.path();
    let before = (seen(state), seen(&state.join("run")), seen(state.parent().unwrap()));
    let document = get(&d, "/openapi.json").json();
    let long = "x".repeat(5_000);
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(path) = path.strip_prefix("/api/v1").filter(|path| path.contains('{')) else { continue };
        for method in ["get", "post", "put", "patch", "delete"].iter().filter(|m| methods.get(**m).is_some()) {
            for strange in STRANGE.iter().copied().chain([&*long]) {
                // Each part that is a parameter, and then the last one alone.
                let parts: Vec<&str> = path.split('/').collect();
                let last = parts.iter().rposition(|part| part.starts_with('{')).unwrap();
                for only_last in [false, true] {
                    let filled = parts.iter().enumerate().map(|(n, part)| match part.starts_with('{') {
                        true if only_last && n != last => id.as_str(),
                        true => strange,
                        false => *part,
                    });
                    let asked = filled.collect::<Vec<_>>().join("/");
                    let answer = call(&d, &method.to_uppercase(), &asked, "application/json", b"{}");
                    // What is a name in a sandbox, as of a variable, may be one.
                    let least = if only_last && n_of_parameters(&parts) > 1 { 200 } else { 400 };
                    assert!((least..500).contains(&answer.status), "{method} {asked}: {}", answer.status);
                    tried += 1;
                }
            }
        }
    }
    // As names, and as what is to be found by them.
    for strange in
        ["..", ".", "../../etc", "/etc/passwd", "../store", "a/b", "x\0y", "x\ny", "", " ", "~", "miosa.sock", &long]
    {
        for (path, body) in [
            ("/sandboxes", json!({ "template_id": "base", "name": strange })),
            ("/sandboxes", json!({ "template_id": strange })),
            ("/sandboxes", json!({ "snapshot_id": strange })),
            ("/volumes", json!({ "name": strange, "size_bytes": 16 << 20 })),
            ("/disks", json!({ "name": strange, "size_bytes": 1 << 20 })),
            (&format!("/sandboxes/{id}/fork"), json!({ "name": strange })),
            (&format!("/sandboxes/{id}/snapshots"), json!({ "name": strange })),
        ] {
            let answer = post(&d, path, &body);
            assert!((200..500).contains(&answer.status), "{path} {strange:?}: {}", answer.status);
            tried += 1;
        }
    }
    assert!(tried > 1_000, "{tried}");
    let after = (seen(state), seen(&state.join("run")), seen(state.parent().unwrap()));
    let new = |a: &std::collections::BTreeSet<std::ffi::OsString>, b: &std::collections::BTreeSet<_>| {
        a.difference(b).map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    assert_eq!(new(&after.0, &before.0), Vec::<String>::new());
    for name in new(&after.1, &before.1) {
        assert!(name.starts_with("sb-"), "{name}");
    }
    // Others make files there, too; none of them is called so.
    for name in new(&after.2, &before.2) {
        assert!(!name.contains("etc") && !name.contains("store") && name != "x", "{name}");
    }
}

/// A client that reuses its connections sends the next request where the last one was refused.
#[test]
fn a_refusal_leaves_the_connection_to_the_next_request() {
    let d = Daemon::start();
    let mut stream = UnixStream::connect(d.dir.path().join("miosa.sock")).unwrap();
    for path in ["/sandboxes/none/deploy", "/nowhere", "/health"] {
        let head = format!("POST /api/v1{path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // Long enough for an answer that waits for nothing; nothing depends on it.
        std::thread::sleep(std::time::Duration::from_millis(100));
        stream.write_all(b"{}").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}}") {
            let mut bytes = [0; 1024];
            let len = stream.read(&mut bytes).unwrap();
            assert!(len > 0, "{path}: the connection was closed");
            answer.extend_from_slice(&bytes[..len]);
        }
    }
}

#[test]
fn a_sandbox_has_the_public_fields() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let data = get(&d, &format!("/sandboxes/{id}")).data();
    for field in [
        "id",
        "name",
        "slug",
        "state",
        "ready",
        "template_id",
        "image_id",
        "cpu_count",
        "memory_mb",
        "disk_size_mb",
        "timeout_sec",
        "timeout_remaining_ms",
        "idle_timeout_sec",
        "always_on",
        "persistent",
        "boot_path",
        "boot_ms",
        "ready_at",
        "preview_url",
        "metadata",
        "tags",
        "created_at",
        "started_at",
        "destroyed_at",
        "total_runtime_sec",
    ] {
        assert!(data.get(field).is_some(), "{field} is missing: {data}");
    }
    assert_eq!(get(&d, "/sandboxes/by-name/one").data()["id"], *id);
    let list = get(&d, "/sandboxes").json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["page"]["has_more"]), (1, &false.into()));
    assert_eq!(get(&d, &format!("/sandboxes/{id}/readiness")).data()["ready"], true);

    let snapshot = post(&d, &format!("/sandboxes/{id}/snapshots"), &json!({ "comment": "c" })).data();
    for field in ["id", "snapshot_id", "sandbox_id", "status", "comment", "created_at", "updated_at", "size_bytes"] {
        assert!(snapshot.get(field).is_some(), "{field} is missing: {snapshot}");
    }
    let route = format!("/sandboxes/{id}/snapshots/{}", snapshot["id"].as_str().unwrap());
    assert_eq!(get(&d, &route).data()["comment"], "c");
    assert_eq!(call(&d, "DELETE", &route, "", b"").status, 200);
    assert_eq!(get(&d, &route).code(), "snapshot_not_found");
    assert_eq!(post(&d, &format!("/sandboxes/{id}/pause"), &json!({})).data()["state"], "paused");
    assert_eq!(call(&d, "DELETE", &format!("/sandboxes/{id}"), "", b"").data()["state"], "destroyed");
    assert_eq!(post(&d, &format!("/sandboxes/{id}/resume"), &json!({})).status, 410);
}

#[test]
fn a_command_is_a_line_for_a_shell_or_a_program_with_arguments() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let exec = |body| post(&d, &format!("/sandboxes/{id}/exec"), &body);
    let ran = exec(json!({ "command": "echo out; echo err >&2; exit 5", "env": { "A": "b" } })).data();
    assert_eq!((&ran["stdout"], &ran["stderr"], &ran["exit_code"]), (&"out\n".into(), &"err\n".into(), &5.into()));
    assert_eq!(exec(json!({ "command": ["printf", "%s", "a b"] })).data()["stdout"], "a b");
    assert_eq!(exec(json!({ "command": ["cat"], "stdin": "given" })).data()["stdout"], "given");
    assert_eq!(exec(json!({ "command": "sleep 600", "timeout": 0.2 })).data()["exit_code"], 124);
    assert_eq!(exec(json!({ "command": ["no-such-program"] })).code(), "command_not_found");
    assert_eq!(exec(json!({ "command": [] })).code(), "invalid_input");
    assert_eq!(exec(json!({ "command": "true", "timeout": -1 })).code(), "invalid_input");
    // As events, a line each.
    let stream = post(&d, &format!("/sandboxes/{id}/exec/stream"), &json!({ "command": "printf 'a\\nb'" }));
    assert!(stream.head.contains("text/event-stream"), "{}", stream.head);
    let text = String::from_utf8(stream.body).unwrap();
    let events = "event: stdout\ndata: {\"line\":\"a\"}\n\nevent: stdout\ndata: {\"line\":\"b\"}\n\nevent: exit\ndata: {\"exit_code\":0,";
    assert!(text.starts_with(events), "{text}");
    let absent = post(&d, &format!("/sandboxes/{id}/exec/exec-none/stdin"), &json!({}));
    assert_eq!((absent.status, absent.code().as_str()), (404, "exec_not_found"));
}

#[test]
fn a_detached_command_goes_on_and_its_output_is_kept() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let commands = format!("/sandboxes/{id}/commands");
    let run = |body| post(&d, &commands, &body);
    let ran = run(json!({ "command": "cat; pwd", "stdin": "in ", "cwd": ".", "timeout_seconds": 60 })).data();
    assert!(ran["stdout"].as_str().unwrap().starts_with("in /"), "{ran}");
    assert_eq!(get(&d, &commands).data(), json!([]), "one that is waited for is not listed");

    let line = "echo out; echo err >&2; until [ -e go ]; do sleep 0.05; done; printf 'last\\377'; exit 3";
    let started = run(json!({ "command": line, "detached": true, "name": "web" })).data();
    let command = format!("{commands}/{}", started["id"].as_str().unwrap());
    assert_eq!((&started["status"], &started["name"]), (&"running".into(), &"web".into()));
    let by_pid = get(&d, &format!("{commands}/{}", started["pid"])).data();
    assert_eq!(by_pid["id"], started["id"]);
    assert_eq!(get(&d, &commands).data().as_array().unwrap().len(), 1);
    run(json!({ "command": "touch go" })).data();
    let events = get(&d, &format!("{command}/logs?follow=true"));
    assert!(events.head.contains("text/event-stream"), "{}", events.head);
    let text = String::from_utf8(events.body).unwrap();
    assert!(text.contains("{\"line\":\"out\"}") && text.contains("event: exit\ndata: {\"exit_code\":3,"), "{text}");
    let logs = get(&d, &format!("{command}/logs")).data();
    assert_eq!((&logs["stdout"], &logs["stderr"]), (&"out\nlast\u{fffd}".into(), &"err\n".into()));
    assert_eq!((&logs["status"], &logs["exit_code"], &logs["output_bytes"]), (&"exited".into(), &3.into(), &13.into()));

    let stubborn = run(json!({ "command": "trap '' INT; echo deaf; sleep 600", "detached": true })).data();
    let stubborn = format!("{commands}/{}", stubborn["id"].as_str().unwrap());
    while get(&d, &format!("{stubborn}/logs")).data()["stdout"] != "deaf\n" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = |body| post(&d, &format!("{stubborn}/kill"), &body);
    assert_eq!(kill(json!({ "signal": "int" })).data()["status"], "running");
    assert_eq!(kill(json!({ "signal": "SIGNONE" })).code(), "invalid_input");
    let killed = kill(json!({})).data();
    assert_eq!((&killed["status"], &killed["signal"]), (&"exited".into(), &15.into()));

    assert_eq!(get(&d, &format!("{commands}/cmd-none")).code(), "exec_not_found");
    assert_eq!(run(json!({ "command": ["no-such-program"], "detached": true })).code(), "command_not_found");
    let fed = run(json!({ "command": "cat", "stdin": "x", "detached": true }));
    assert_eq!((fed.status, fed.code().as_str()), (422, "unsupported_option"));
    assert_eq!(run(json!({ "command": "true", "tty": true })).code(), "unsupported_option");
    // They end with the session, and looking starts none.
    post(&d, &format!("/sandboxes/{id}/stop"), &json!({})).data();
    assert_eq!(get(&d, &commands).data(), json!([]));
    assert_eq!(get(&d, &command).code(), "exec_not_found");
    assert_eq!(get(&d, &format!("/sandboxes/{id}")).data()["state"], "paused");
}

#[test]
fn what_is_not_done_is_refused_and_not_ignored() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let refused = |path: &str, body: Value, name: &str| {
        let answer = post(&d, path, &body);
        assert_eq!((answer.status, answer.code().as_str()), (422, "unsupported_option"), "{body}");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(name), "{body}");
    };
    refused("/sandboxes", json!({ "services": [{ "name": "db" }], "keep_last_snapshots": 3 }), "services");
    refused(&format!("/sandboxes/{id}/exec"), json!({ "command": "true", "detached": true }), "detached");
    refused(&format!("/sandboxes/{id}/exec/stream"), json!({ "command": "true", "tty": true }), "tty");
    refused(&format!("/sandboxes/{id}/fork"), json!({ "count": 2, "size": "xl" }), "size");
    assert_eq!(get(&d, "/sandboxes").data().as_array().unwrap().len(), 1);
    // What asks for nothing, or makes no difference here, is no reason to refuse.
    let fine = json!({
        "name": "two", "auto_start": false, "idle_timeout_sec": null, "always_on": false, "services": [],
        "workspace_id": "w", "project_slug": "p", "external_user_id": "u", "slug": "two", "region": "eu",
    });
    assert_eq!(post(&d, "/sandboxes", &fine).data()["name"], "two");
}

#[test]
fn a_disk_can_be_sent_as_its_bytes() {
    let d = Daemon::start();
    let send = |name: &str, size: u64, bytes: &[u8]| {
        call(&d, "POST", &format!("/disk-imports?name={name}&size_bytes={size}"), "application/octet-stream", bytes)
    };
    let made = send("raw", 8_192, &[7; 8_192]);
    assert_eq!((made.status, &made.data()["logical_bytes"]), (201, &8_192.into()));
    for (answer, code) in [
        (send("short", 8_192, &[7; 4_096]), "invalid_input"),
        (send("long", 4_096, &[7; 8_192]), "invalid_input"),
        (send("odd", 5_000, &[7; 5_000]), "invalid_input"),
        (send("raw", 8_192, &[7; 8_192]), "name_taken"),
        (call(&d, "POST", "/disk-imports?name=x", "application/octet-stream", b""), "invalid_input"),
        (
            call(&d, "POST", "/disk-imports?name=x&size_bytes=4096", "application/x-miosa-sparse", b"no"),
            "invalid_input",
        ),
    ] {
        assert_eq!(answer.code(), code);
    }
    let own = get(&d, "/disks").data().as_array().unwrap().iter().filter(|x| x["owner"].is_null()).count();
    assert_eq!(own, 1);
    let stream = get(&d, "/disks/raw/export").body;
    assert!(stream.len() > 8_192 && stream.windows(8_192).any(|w| w == [7; 8_192]));
}

#[test]
fn files_come_as_json_or_as_they_are() {
    let d = Daemon::start();
    let id = sandbox(&d);
    let write = |body| post(&d, &format!("/sandboxes/{id}/fs/write"), &body);
    let read = |path: &str| get(&d, &format!("/sandboxes/{id}/fs/download?path={path}"));
    let bytes: Vec<u8> = (0..=255).collect();
    write(json!({ "path": "/workspace/b", "content_base64": BASE64.encode(&bytes) })).data();
    assert!(read("/workspace/b").body == bytes);
    write(json!({ "path": "/workspace/t", "content": "aGk=" })).data();
    assert_eq!(read("/workspace/t").body, b"aGk=");
    let raw = call(
        &d,
        "PUT",
        &format!("/sandboxes/{id}/fs/write?path=/workspace/r&mode=600"),
        "application/octet-stream",
        &bytes,
    );
    assert_eq!(raw.data()["size_bytes"], 256);
    assert!(read("/workspace/r").body == bytes);
    assert_eq!(read("/absent").code(), "file_not_found");
    assert_eq!(read("relative").code(), "invalid_input");
    assert_eq!(write(json!({ "path": "/x" })).code(), "invalid_input");
    assert_eq!(write(json!({ "path": "/x", "content_base64": "*" })).code(), "invalid_input");
}

#[test]
fn what_is_wrong_with_a_request_is_said() {
    let d = Daemon::start();
    for (answer, status, code) in [
        (get(&d, "/nothing"), 404, "route_not_found"),
        (get(&d, "/databases"), 501, "not_supported"),
        (call(&d, "PATCH", "/sandboxes", "application/json", b"{}"), 405, "method_not_allowed"),
        (call(&d, "POST", "/sandboxes", "application/json", b"{"), 400, "invalid_json"),
        (call(&d, "POST", "/sandboxes", "application/json", b"[]"), 400, "invalid_json"),
        (post(&d, "/sandboxes", &json!({ "template_id": 5 })), 422, "invalid_input"),
        (call(&d, "POST", "/sandboxes", "text/plain", b"{}"), 415, "unsupported_media_type"),
        (post(&d, "/sandboxes", &json!({ "template_id": "base", "snapshot_id": "s" })), 422, "invalid_input"),
        (post(&d, "/sandboxes", &json!({ "cpu_count": 0 })), 422, "invalid_input"),
        (post(&d, "/sandboxes", &json!({ "timeout_sec": u64::MAX })), 422, "invalid_input"),
        (post(&d, "/sandboxes", &json!({ "env": { "A=B": "c" } })), 422, "invalid_input"),
        (post(&d, "/sandboxes", &json!({ "name": "x".repeat(2 << 20) })), 413, "body_too_large"),
        (get(&d, "/sandboxes?state=asleep"), 422, "invalid_input"),
        (get(&d, "/sandboxes/%2e%2e%2fetc"), 404, "sandbox_not_found"),
        (get(&d, "/sandboxes/%ff"), 400, "invalid_path"),
        (get(&d, "/snapshots/none"), 404, "snapshot_not_found"),
        (get(&d, "/sandbox-templates/none"), 404, "template_not_found"),
    ] {
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{}",
            String::from_utf8_lossy(&answer.body)
        );
    }
    assert_eq!(get(&d, "/health").data()["status"], "ok");
    assert!(get(&d, "/sandboxes").data().as_array().unwrap().is_empty());
}

#[test]
fn lists_come_in_pages() {
    let d = Daemon::start();
    for i in 0..5 {
        post(&d, "/sandboxes", &json!({ "name": format!("s{i}"), "auto_start": false })).data();
    }
    let names = |page: &Value| -> Vec<String> {
        page["data"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
    };
    let first = get(&d, "/sandboxes?limit=2").json();
    assert_eq!(names(&first), ["s0", "s1"]);
    assert_eq!((&first["page"]["total"], &first["page"]["has_more"]), (&5.into(), &true.into()));
    // What is deleted between two pages moves nothing.
    call(&d, "DELETE", "/sandboxes/s1", "", b"").data();
    let cursor = first["page"]["next_cursor"].as_str().unwrap();
    let second = get(&d, &format!("/sandboxes?limit=2&cursor={cursor}")).json();
    assert_eq!(names(&second), ["s2", "s3"]);
    let cursor = second["next_cursor"].as_str().unwrap();
    let last = get(&d, &format!("/sandboxes?limit=2&cursor={cursor}")).json();
    assert_eq!((names(&last), &last["page"]["has_more"]), (vec!["s4".to_owned()], &false.into()));
    assert!(last["page"].get("next_cursor").is_none() && last.get("next_cursor").is_none(), "{last}");
    assert_eq!(names(&get(&d, "/sandboxes?offset=3").json()), ["s4"]);
    assert_eq!(names(&get(&d, "/sandboxes").json()).len(), 4);
    assert_eq!(get(&d, "/disks?limit=1").json()["page"]["count"], 1);
    for query in ["limit=0", "limit=1001", "limit=x", "limit=-1", "offset=x", "cursor=*", "cursor=eA"] {
        assert_eq!(get(&d, &format!("/sandboxes?{query}")).code(), "invalid_input", "{query}");
    }
}

#[test]
fn lists_are_filtered_by_state_name_and_tags() {
    let d = Daemon::start();
    for (name, tags) in [("a", json!(["ci", "eu"])), ("b", json!(["ci"])), ("c", json!([]))] {
        post(&d, "/sandboxes", &json!({ "name": name, "tags": tags, "auto_start": name == "b" })).data();
    }
    let found = |query: &str| -> Vec<String> {
        let list = get(&d, &format!("/sandboxes?{query}")).json();
        list["data"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
    };
    for (query, expected) in [
        ("tags=ci", &["a", "b"][..]),
        ("tags=ci,eu", &["a"]),
        ("tags=eu,ci&limit=1", &["a"]),
        ("tags=none", &[]),
        ("tags=%2C", &[]),
        ("name=c", &["c"]),
        ("name=c&tags=ci", &[]),
        ("name=&tags=&state=", &["a", "b", "c"]),
        ("state=paused&tags=ci", &["a"]),
        ("state=destroyed", &[]),
    ] {
        assert_eq!(found(query), expected, "{query}");
    }
}

#[test]
fn the_document_describes_what_is_served() {
    let d = Daemon::start();
    let document = get(&d, "/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 30, "{}", paths.len());
    for (path, item) in paths {
        let Some(route) = path.strip_prefix("/api/v1") else { continue };
        // One that nobody has, so that nothing is done.
        let asked = route.split('/').map(|p| if p.starts_with('{') { "none" } else { p }).collect::<Vec<_>>().join("/");
        for (method, operation) in item.as_object().unwrap() {
            let what = format!("{method} {path}");
            assert!(operation["summary"].as_str().is_some_and(|s| !s.is_empty()), "{what} is not described");
            let ok = operation["responses"].as_object().unwrap().keys().any(|s| s.starts_with('2') || s == "101");
            assert!(ok && operation["responses"]["4XX"].is_object(), "{what}: {operation}");
            let named = operation["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] == "path");
            assert_eq!(named.count(), path.matches('{').count(), "{what}");
            if route.starts_with("/store/") {
                continue;
            }
            let answer = call(&d, &method.to_uppercase(), &asked, "application/json", b"{}");
            if answer.status >= 300 {
                assert!(!["route_not_found", "method_not_allowed"].contains(&answer.code().as_str()), "{what}");
            }
        }
    }
    // And the other way round: a route can only be added together with its description.
    let mut looked = 0;
    let mut dirs = vec![std::path::PathBuf::from("src/api")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if !path.ends_with("openapi.rs") {
                looked += 1;
                assert!(!std::fs::read_to_string(&path).unwrap().contains(".route(\""), "{}", path.display());
            }
        }
    }
    assert!(looked > 8);
}

/// With a key.
fn keyed(d: &Daemon, key: &str, path: &str, body: &Value) -> Answer {
    let kind = format!("application/json\r\nidempotency-key: {key}");
    call(d, "POST", path, &kind, body.to_string().as_bytes())
}

#[test]
fn a_request_with_the_key_of_an_earlier_one_is_not_carried_out_again() {
    let mut d = Daemon::start();
    let body = json!({ "auto_start": false });
    let first = keyed(&d, "k1", "/sandboxes", &body);
    let again = keyed(&d, "k1", "/sandboxes", &body);
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!(first.data(), again.data());
    assert!(!first.head.contains("idempotent-replayed") && again.head.contains("idempotent-replayed: true"));
    assert_ne!(keyed(&d, "k2", "/sandboxes", &body).data()["id"], first.data()["id"]);
    // Another request under the same key is told so.
    for (path, body) in
        [("/sandboxes", json!({ "auto_start": false, "name": "x" })), ("/sandboxes?wait=1", body.clone())]
    {
        let reused = keyed(&d, "k1", path, &body);
        assert_eq!((reused.status, reused.code().as_str()), (422, "idempotency_key_reused"));
    }
    // A refusal leaves the key free.
    assert_eq!(keyed(&d, "k3", "/sandboxes", &json!({ "template_id": "none" })).code(), "template_not_found");
    assert_eq!(keyed(&d, "k3", "/sandboxes", &body).status, 201);
    // The answer outlives the daemon.
    d.end(nix::sys::signal::Signal::SIGKILL);
    d.start_again();
    assert_eq!(keyed(&d, "k1", "/sandboxes", &body).data(), first.data());
    assert_eq!(get(&d, "/sandboxes").data().as_array().unwrap().len(), 3);
    for (path, key, code) in [
        ("/sandboxes", &"x".repeat(256)[..], "invalid_input"),
        ("/sandboxes/none/exec/stream", "k", "unsupported_option"),
        ("/sandbox-templates?stream=true", "k", "unsupported_option"),
    ] {
        assert_eq!(keyed(&d, key, path, &json!({})).code(), code, "{path}");
    }
}

#[test]
fn many_at_once_with_one_key_are_one() {
    let d = Daemon::start();
    let id = sandbox(&d);
    // Commands of a stand-in run here.
    let log = d.dir.path().join("commands.log");
    let log = log.to_str().unwrap();
    let line = json!({ "command": format!("echo once >> {log}; sleep 0.3; cat {log}") });
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..8).map(|_| scope.spawn(|| keyed(&d, "same", &format!("/sandboxes/{id}/exec"), &line).data())).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|a| *a == answers[0] && a["stdout"] == "once\n"), "{answers:?}");
    // One whose caller does not wait is carried out, and its answer kept.
    let body = json!({ "command": format!("sleep 1; echo twice >> {log}") }).to_string();
    let mut stream = UnixStream::connect(d.dir.path().join("miosa.sock")).unwrap();
    write!(
        stream,
        "POST /api/v1/sandboxes/{id}/exec HTTP/1.1\r\nhost: x\r\nidempotency-key: gone\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(stream);
    let kept = keyed(&d, "gone", &format!("/sandboxes/{id}/exec"), &serde_json::from_str(&body).unwrap());
    assert_eq!(kept.data()["exit_code"], 0);
    assert_eq!(std::fs::read_to_string(log).unwrap(), "once\ntwice\n");
}

#[test]
fn an_outcome_that_nobody_knows_is_told_and_not_guessed() {
    let mut d = Daemon::start();
    let id = sandbox(&d);
    let body = json!({ "command": "sleep 600" });
    let path = format!("/sandboxes/{id}/exec");
    std::thread::scope(|scope| {
        // Its answer never comes.
        scope.spawn(|| {
            let mut stream = UnixStream::connect(d.dir.path().join("miosa.sock")).unwrap();
            let body = body.to_string();
            let head = format!("POST /api/v1{path} HTTP/1.0\r\ncontent-type: application/json\r\nidempotency-key: k\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(head.as_bytes()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(500));
        });
    });
    // Something durable comes after it, as it would after anything that the request had made.
    post(&d, "/sandboxes", &json!({ "auto_start": false })).data();
    d.end(nix::sys::signal::Signal::SIGKILL);
    d.start_again();
    let unknown = keyed(&d, "k", &path, &body);
    assert_eq!((unknown.status, unknown.code().as_str()), (409, "idempotency_outcome_unknown"));
}

#[test]
fn figures_are_for_prometheus() {
    let d = Daemon::start();
    let id = sandbox(&d);
    post(&d, &format!("/sandboxes/{id}/exec"), &json!({ "command": "true" })).data();
    post(&d, &format!("/sandboxes/{id}/snapshots"), &json!({})).data();
    get(&d, "/sandboxes/none");
    get(&d, "/no/such/route");
    assert_eq!(post(&d, "/store/check", &json!({})).data()["damage"], json!([]));
    let mut stream = UnixStream::connect(d.dir.path().join("miosa.sock")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    for line in [
        "content-type: application/openmetrics-text",
        "miosa_sandboxes{state=\"running\"} 1",
        "miosa_sandboxes{state=\"paused\"} 0",
        "miosa_execs_total 1",
        "miosa_boot_duration_seconds_count 1",
        "miosa_http_requests_total{method=\"GET\",route=\"/api/v1/sandboxes/{id}\",status=\"404\"} 1",
        "miosa_http_request_duration_seconds_count{method=\"POST\",route=\"/api/v1/sandboxes\"} 1",
        "miosa_freeze_duration_seconds_count{phase=\"freeze\"} 1",
        "miosa_freeze_duration_seconds_count{phase=\"commit\"} 1",
        "miosa_freezes_failed_total 0",
        "miosa_disk_requests_total{front_end=\"vhost-user\",operation=\"flush\"} 0",
        "miosa_disk_bytes_total{front_end=\"fuse\",operation=\"write\"} 0",
        "miosa_disk_errors_total{front_end=\"vhost-user\",operation=\"read\"} 0",
        "# TYPE miosa_store_stored_bytes gauge",
        "# TYPE miosa_store_collections counter",
        "miosa_store_damage 0",
        "miosa_process_open_fds ",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
    assert!(!text.contains(&id) && !text.contains("no/such"), "{text}");
    let checked = text.lines().find_map(|line| line.strip_prefix("miosa_store_checked_timestamp_seconds ")).unwrap();
    assert!(checked.parse::<u64>().unwrap() > 1_700_000_000, "{checked}");
    assert!(get(&d, "/openapi.json").json()["paths"]["/metrics"].is_object());
}
