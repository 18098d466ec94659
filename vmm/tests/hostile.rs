//! A guest that lies, floods or says nothing: every call ends with an error of its own, within bounded memory and time.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::time::Duration;

use miosa_agent::wire::{self, Decoder, Frame, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmm::agent::Agent;
use vmm::{ErrorKind, ExecRequest};

/// Far more than any call here is given.
const PATIENCE: Duration = Duration::from_secs(60);

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    fn bytes(&mut self, n: u64) -> Vec<u8> {
        let len = self.below(n + 1);
        (0..len).map(|_| self.bits() as u8).collect()
    }
}

/// The guest's end of a connection whose greeting has been answered properly.
async fn connected() -> (Agent, UnixStream) {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let answering = async {
        let mut decoder = Decoder::guest();
        let mut bytes = [0; 4096];
        loop {
            let len = guest.read(&mut bytes).await.unwrap();
            decoder.push(&bytes[..len]);
            if let Some(hello) = decoder.next_frame().unwrap() {
                let mut ack = Vec::new();
                wire::hello_ack(hello.hello().unwrap().0).encode(&mut ack);
                guest.write_all(&ack).await.unwrap();
                return guest;
            }
        }
    };
    let (agent, guest) = tokio::join!(Agent::over(host, PATIENCE), answering);
    (agent.unwrap().with_timeout(Duration::from_millis(300)), guest)
}

/// One of each call; whatever the guest does, each comes to an end.
async fn every_call_ends(agent: &Agent) {
    let exec = async {
        match agent.exec(ExecRequest { argv: vec!["x".into()], timeout_ms: Some(1), ..Default::default() }).await {
            Ok(stream) => stream.collect(1 << 20).await.map(drop),
            Err(error) => Err(error),
        }
    };
    let read = async { agent.read_file("/f").await?.read_to_end(1 << 20).await.map(drop) };
    let write = async {
        let mut writer = agent.write_file("/f", None).await?;
        writer.write(&[7; 1 << 20]).await?;
        writer.finish().await
    };
    let all = async {
        let list = agent.list("/d", 1_000);
        tokio::join!(agent.ping(), agent.stat("/f"), agent.thaw(), exec, read, write, list)
    };
    let (ping, stat, thaw, exec, read, write, list) = tokio::time::timeout(PATIENCE, all).await.expect("a call hangs");
    let outcomes = [ping.map(drop), stat.map(drop), thaw.map(drop), exec, read, write, list.map(drop)];
    for error in outcomes.into_iter().filter_map(Result::err) {
        let expected = matches!(
            error.kind,
            ErrorKind::AgentLost | ErrorKind::AgentTimeout | ErrorKind::Guest(_) | ErrorKind::Invalid
        );
        assert!(expected, "{error:?}");
    }
}

/// A frame that may be anything.
fn any_frame(random: &mut Random) -> Vec<u8> {
    let kinds = [
        Kind::Hello,
        Kind::HelloAck,
        Kind::Open,
        Kind::Data,
        Kind::ErrData,
        Kind::Eof,
        Kind::Cancel,
        Kind::Window,
        Kind::End,
        Kind::Connected,
    ];
    let kind = kinds[random.below(kinds.len() as u64) as usize];
    let stream = [random.below(12) as u32, random.bits() as u32][random.below(2) as usize];
    let payload = match random.below(4) {
        0 => random.bytes(64 * 1024),
        1 => random.bytes(30),
        2 => (random.bits() as u32).to_le_bytes().to_vec(),
        // A list whose entry claims to be longer than anything.
        _ => [&u32::MAX.to_le_bytes()[..], &random.bytes(10)].concat(),
    };
    let mut bytes = Vec::new();
    Frame::new(stream, kind, payload).encode(&mut bytes);
    match random.below(8) {
        0 => bytes[8..12].copy_from_slice(&(random.bits() as u32).to_le_bytes()),
        1 => {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        2 => bytes.truncate(random.below(bytes.len() as u64) as usize),
        _ => {}
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_sends_anything_at_all_ends_calls_and_nothing_else() {
    for seed in 1..40 {
        let (agent, mut guest) = connected().await;
        let lying = tokio::spawn(async move {
            let mut random = Random(seed * 0x9e37_79b9);
            for _ in 0..200 {
                let bytes = if random.below(20) == 0 { random.bytes(2_000) } else { any_frame(&mut random) };
                if guest.write_all(&bytes).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            // And then it says nothing more, and does not hang up.
            let mut bytes = [0; 4096];
            while guest.read(&mut bytes).await.is_ok_and(|len| len > 0) {}
        });
        every_call_ends(&agent).await;
        drop(agent);
        tokio::time::timeout(PATIENCE, lying).await.expect("the connection stays").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_says_nothing_times_out() {
    let (agent, _guest) = connected().await;
    assert_eq!(agent.ping().await.unwrap_err().kind, ErrorKind::AgentTimeout);
    every_call_ends(&agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_floods_is_hung_up_on_at_its_credit() {
    let (agent, mut guest) = connected().await;
    // Nobody reads what comes on this stream.
    let stuck = agent.exec(ExecRequest { argv: vec!["yes".into()], ..Default::default() }).await.unwrap();
    let mut frame = Vec::new();
    Frame::new(1, Kind::Data, vec![b'y'; wire::MAX_PAYLOAD]).encode(&mut frame);
    let mut sent = 0;
    // Once nobody reads any more, only what the socket itself holds can be sent.
    while let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), guest.write_all(&frame)).await {
        sent += 1;
        assert!(sent < 100, "the flood goes on");
    }
    assert_eq!(agent.ping().await.unwrap_err().kind, ErrorKind::AgentLost);
    drop(stuck);
}

/// Its steps are told once, in order; whatever else a guest says of a connection ends all, and nothing gathers.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_tells_of_a_connection_out_of_order_is_hung_up_on() {
    use Kind::{Connected, Data, Eof};
    for steps in [&[Data][..], &[Eof], &[Connected, Connected], &[Connected, Eof, Eof], &[Connected, Eof, Data]] {
        let (agent, mut guest) = connected().await;
        let mut bytes = Vec::new();
        steps.iter().for_each(|kind| Frame::new(1, *kind, Vec::new()).encode(&mut bytes));
        let connecting = agent.connect_port(80, Duration::ZERO);
        let lying = async {
            // The stream is there once its request is.
            let mut request = [0; 1];
            guest.read_exact(&mut request).await.unwrap();
            guest.write_all(&bytes).await.unwrap();
        };
        let (_connection, ()) = tokio::join!(connecting, lying);
        let lost = async { while agent.ping().await.unwrap_err().kind != ErrorKind::AgentLost {} };
        tokio::time::timeout(PATIENCE, lost).await.unwrap_or_else(|_| panic!("{steps:?} is taken"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_version_is_told_apart() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let answering = tokio::spawn(async move {
        let mut decoder = Decoder::guest();
        let mut bytes = [0; 4096];
        loop {
            let len = guest.read(&mut bytes).await.unwrap();
            decoder.push(&bytes[..len]);
            if let Some(hello) = decoder.next_frame().unwrap() {
                let payload = [&hello.hello().unwrap().0[..], &1_u32.to_le_bytes()[..]].concat();
                let mut ack = Vec::new();
                Frame::new(0, Kind::HelloAck, payload).encode(&mut ack);
                guest.write_all(&ack).await.unwrap();
                return guest;
            }
        }
    });
    let error = Agent::over(host, PATIENCE).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AgentLost);
    assert!(error.message.contains("version 1") && error.hint.is_some(), "{error:?}");
    answering.await.unwrap();
}
