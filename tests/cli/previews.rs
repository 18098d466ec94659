//! Previews as a browser meets them. The guests are stand-ins whose agent is real: their loopback is this machine's.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::support::Daemon;

/// A web server that remembers the heads of requests, and whose answers depend on the path. Ends with the test.
struct Site {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Site {
    fn open() -> Site {
        Site::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
    }

    fn on(listener: TcpListener) -> Site {
        let site = Site { port: listener.local_addr().unwrap().port(), heads: Arc::default() };
        let heads = site.heads.clone();
        std::thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                let heads = heads.clone();
                std::thread::spawn(move || serve(caller, &heads));
            }
        });
        site
    }

    fn last_head(&self) -> String {
        self.heads.lock().unwrap().last().cloned().unwrap_or_default().to_lowercase()
    }

    fn asked(&self) -> usize {
        self.heads.lock().unwrap().len()
    }
}

fn serve(caller: TcpStream, heads: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(caller.try_clone().unwrap());
    let mut head = String::new();
    while reader.read_line(&mut head).is_ok_and(|len| len > 2) {}
    heads.lock().unwrap().push(head.clone());
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut caller = caller;
    match path.as_str() {
        "/socket" => {
            caller
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n")
                .unwrap();
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|len| len > 0) {
                caller.write_all(line.to_uppercase().as_bytes()).unwrap();
                line.clear();
            }
        }
        "/upload" => {
            let length = |head: &str| {
                head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok())
            };
            let mut body = vec![0; length(&head).unwrap()];
            reader.read_exact(&mut body).unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            caller.write_all(answer.as_bytes()).unwrap();
            body.reverse();
            caller.write_all(&body).unwrap();
        }
        "/events" => {
            let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n";
            caller.write_all((head.to_owned() + &chunk("data: 1\n\n")).as_bytes()).unwrap();
            // The second comes only once the first was read: nobody may collect them.
            let mut go = [0];
            let _ = reader.read(&mut go);
        }
        "/noise" => caller.write_all(b"this is no HTTP at all\r\n\r\n").unwrap(),
        _ => {
            let body = format!("you asked for {path}");
            let answer = format!(
                "HTTP/1.1 200 OK\r\nset-cookie: own=1; Domain=localhost\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            caller.write_all(answer.as_bytes()).unwrap();
        }
    }
}

/// `http://HOST:PORT/REST` in its parts.
fn parts(url: &str) -> (String, u16, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (authority, path) = rest.split_once('/').unwrap();
    (authority.to_owned(), authority.rsplit_once(':').unwrap().1.parse().unwrap(), format!("/{path}"))
}

struct Answered {
    status: u16,
    head: String,
    body: Vec<u8>,
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    stream
}

fn ask(url: &str, request: &str, more: &[&str], body: &[u8]) -> Answered {
    let (host, port, path) = parts(url);
    let mut stream = connect(port);
    let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
    let head = format!("{request} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let end =
        all.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&all)));
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answered { status, head: head.to_lowercase(), body: all[end + 4..].to_vec() }
}

fn get(url: &str, more: &[&str]) -> Answered {
    ask(url, "GET", more, b"")
}

/// The address of a port, as the command prints it.
fn preview(d: &Daemon, args: &[&str]) -> String {
    let ran = d.run(&[&["sandbox", "preview", "web", "--quiet"], args].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.out.trim().to_owned()
}

fn page_of(url: &str, page: &str) -> String {
    let (base, token) = url.split_once('?').map_or((url, String::new()), |(base, token)| (base, format!("?{token}")));
    format!("{}{page}{token}", base.trim_end_matches('/'))
}

#[test]
fn a_private_preview_is_opened_by_its_link_and_the_guest_never_sees_the_token() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let site = Site::open();
    let port = site.port.to_string();
    let url = preview(&d, &["--port", &port]);
    assert!(url.starts_with(&format!("http://{port}-web.localhost:")), "{url}");
    let (plain, token) = url.split_once("?mt=").unwrap();

    let refused = get(plain, &[]);
    assert_eq!(refused.status, 401);
    assert!(String::from_utf8_lossy(&refused.body).contains("preview_token_needed"));
    assert_eq!(get(plain, &["Accept: text/html"]).status, 401);
    assert_eq!(get(&format!("{plain}?mt=mp_AAAA"), &[]).status, 401);
    assert_eq!(site.asked(), 0);

    let opened = get(&page_of(&url, "/a?x=1").replace("?mt", "&mt"), &[]);
    assert_eq!((opened.status, &*opened.body), (200, &b"you asked for /a?x=1"[..]));
    assert!(!site.last_head().contains(&token.to_lowercase()), "{}", site.last_head());
    assert!(site.last_head().contains(&format!("host: {port}-web.localhost")));
    // The guest's cookie is for its own host name; ours makes the next request without the token one that may.
    assert!(opened.head.contains("set-cookie: own=1\r\n"), "{}", opened.head);
    assert!(opened.head.contains("set-cookie: miosa_preview=mp_"), "{}", opened.head);
    let cookie = format!("Cookie: own=1; miosa_preview={token}");
    assert_eq!(get(plain, &[&cookie]).status, 200);
    assert!(site.last_head().contains("cookie: own=1\r\n"), "{}", site.last_head());
    assert_eq!(get(plain, &[&format!("X-Miosa-Preview-Token: {token}")]).status, 200);
    assert!(!site.last_head().contains("token"), "{}", site.last_head());

    // A person's browser does not keep the token in its address.
    let sent_on = get(&page_of(&url, "/b"), &["Sec-Fetch-Mode: navigate", "Accept: text/html"]);
    assert_eq!(sent_on.status, 303);
    assert!(sent_on.head.contains("location: /b\r\n"), "{}", sent_on.head);

    // Nothing else is served there.
    let (_, listener, _) = parts(plain);
    for host in ["localhost", "127.0.0.1", "x", "80-web.localhost", &format!("{port}-other.localhost")] {
        assert_eq!(get(&format!("http://{host}:{listener}/api/v1/sandboxes"), &[]).status, 404, "{host}");
    }
}

#[test]
fn links_can_be_public_limited_and_taken_away() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let (site, other) = (Site::open(), Site::open());
    let (port, second) = (site.port.to_string(), other.port.to_string());
    let url = preview(&d, &["--port", &port]);
    let (plain, _) = url.split_once('?').unwrap();
    let looks = preview(&d, &["--port", &port, "--read-only"]);
    assert_eq!(get(&looks, &[]).status, 200);
    assert_eq!(ask(&looks, "POST", &["Content-Length: 0"], b"").status, 403);
    assert_eq!(get(&page_of(&looks, "/socket"), &["Upgrade: echo"]).status, 403);
    assert_eq!(ask(&url, "POST", &["Content-Length: 0"], b"").status, 200);
    let short = preview(&d, &["--port", &port, "--expires", "1s"]);
    let began = std::time::Instant::now();
    while get(&short, &[]).status != 401 {
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(200));
    }
    // Of another port, it opens nothing here.
    let foreign = preview(&d, &["--port", &second]);
    let token = foreign.split_once("?mt=").unwrap().1;
    assert_eq!(get(&format!("{plain}?mt={token}"), &[]).status, 401);

    let again = preview(&d, &["--port", &port, "--revoke"]);
    assert_eq!((get(&url, &[]).status, get(&looks, &[]).status, get(&again, &[]).status), (401, 401, 200));
    assert_eq!(get(&foreign, &[]).status, 200);
    let public = preview(&d, &["--port", &port, "--public"]);
    assert_eq!((public.as_str(), get(&public, &[]).status), (plain, 200));
    assert_eq!(d.run(&["sandbox", "preview", "web", "--list", "--json"]).json().as_array().unwrap().len(), 2);
    preview(&d, &["--port", &port, "--private"]);
    assert_eq!(get(&public, &[]).status, 401);
    d.run(&["sandbox", "preview", "web", "--port", &port, "--delete"]);
    assert_eq!((get(&again, &[]).status, get(&foreign, &[]).status), (404, 200));
    let gone = d.run(&["sandbox", "preview", "web", "--port", &port, "--delete", "--json"]);
    assert_eq!(gone.error(1)["code"], "preview_not_found");

    d.run(&["sandbox", "destroy", "web"]);
    assert_eq!(get(&foreign, &[]).status, 404);
    // A new sandbox of that name is another one.
    d.run(&["sandbox", "create", "--name", "web", "--publish-port", &second, "--wait"]);
    assert_eq!(get(&foreign, &[]).status, 401);
}

#[test]
fn a_preview_starts_a_paused_sandbox_once_and_waits_for_its_port() {
    let d = Daemon::start();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let made =
        d.run(&["sandbox", "create", "--name", "web", "--no-start", "--publish-port", &port.to_string(), "--json"]);
    let url = made.json()["preview_url"].as_str().unwrap().to_owned();
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(|| get(&url, &[]).status)).collect();
        while d.run(&["sandbox", "show", "web", "--json"]).json()["state"] != "running" {
            std::thread::sleep(Duration::from_millis(20));
        }
        Site::on(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
        assert_eq!(asked.into_iter().map(|a| a.join().unwrap()).collect::<Vec<_>>(), [200; 8]);
    });
    let sessions = d.run(&["usage", "--sessions", "--json"]).json();
    assert_eq!(sessions.as_array().unwrap().len(), 1, "{sessions}");

    // A fork has the same ports under a name and a secret of its own.
    let fork = d.run(&["sandbox", "fork", "web", "--name", "Try It", "--json"]).json();
    let own = fork["preview_url"].as_str().unwrap();
    assert!(own.contains(&format!("//{port}-{}.localhost", fork["id"].as_str().unwrap())), "{own}");
    assert_eq!(get(own, &[]).status, 200);
    assert_eq!(get(&own.replace(fork["id"].as_str().unwrap(), "try-it"), &[]).status, 200);
    let token = url.split_once('?').unwrap().1;
    assert_eq!(get(&format!("{}?{token}", own.split_once('?').unwrap().0), &[]).status, 401);
}

#[test]
fn bodies_events_and_other_protocols_pass_as_they_come() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let site = Site::open();
    let url = preview(&d, &["--port", &site.port.to_string()]);

    let sent: Vec<u8> = (0..6_000_000_u32).map(|i| (i % 251) as u8).collect();
    let answer = ask(&page_of(&url, "/upload"), "POST", &[&format!("Content-Length: {}", sent.len())], &sent);
    assert_eq!(answer.status, 200);
    assert!(answer.body.iter().rev().eq(&sent), "{} bytes came back", answer.body.len());

    let (host, port, path) = parts(&page_of(&url, "/events"));
    let mut stream = connect(port);
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).unwrap();
    let mut lines = BufReader::new(&stream).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|line| line == "data: 1"));
    drop(lines);
    drop(stream);

    let (host, port, path) = parts(&page_of(&url, "/socket"));
    let mut stream = connect(port);
    let upgrade = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    stream.write_all(upgrade.as_bytes()).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap() > 2 {}
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.to_lowercase().contains("upgrade: echo"), "{head}");
    for word in ["one\n", "two\n"] {
        stream.write_all(word.as_bytes()).unwrap();
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, word.to_uppercase());
    }

    let noise = get(&page_of(&url, "/noise"), &["Accept: text/html"]);
    assert_eq!(noise.status, 502);
    assert!(String::from_utf8_lossy(&noise.body).contains("does not answer as an HTTP server does"));
    // The sandbox goes on.
    assert_eq!(get(&url, &[]).status, 200);
}

#[test]
fn previews_can_be_had_elsewhere_or_not_at_all() {
    let d = Daemon::start_with(&["--preview-listen", "none"]);
    let made = d.run(&["sandbox", "create", "--name", "web", "--publish-port", "80", "--no-start", "--json"]).json();
    assert_eq!(made["preview_url"], serde_json::Value::Null);
    let off = d.run(&["sandbox", "preview", "web", "--port", "80", "--json"]).error(4);
    assert_eq!(off["code"], "previews_off");
    assert!(off["hint"].as_str().unwrap().contains("--preview-listen"), "{off}");
    let bad = d.run(&["sandbox", "preview", "web", "--port", "0", "--json"]);
    assert_eq!(bad.code, 1, "{bad:?}");
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let taken = free.local_addr().unwrap().to_string();
    let second = super::support::run(
        super::support::miosa(
            d.dir.path().join("other").as_path(),
            &["daemon", "--vmm", "fake", "--json", "--preview-listen", &taken],
        ),
        b"",
    );
    assert_eq!(second.error(4)["code"], "listen");
}
