//! What a guest can send its host, and a host its guest: bytes of the agent's pipe, in pieces. Whatever they are, a frame comes
//! out as it went in, payloads are understood or refused, and no more is held than was sent.

#![no_main]

use libfuzzer_sys::fuzz_target;
use miosa_agent::wire::{Decoder, Frame, Kind, Outcome, Request, TerminalSize, greeting};

fuzz_target!(|data: &[u8]| {
    let Some((&[which, piece], bytes)) = data.split_first_chunk::<2>() else { return };
    let nonce = [7; 16];
    let mut decoder = if which & 1 == 0 { Decoder::guest() } else { Decoder::host(nonce) };
    // Behind a greeting, or instead of one.
    if which & 2 == 0 {
        decoder.push(&greeting(nonce));
        decoder.push(&encoded(&miosa_agent::wire::hello_ack(nonce)));
    }
    for part in bytes.chunks(usize::from(piece).max(1)) {
        decoder.push(part);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => look(&frame),
                Ok(None) => break,
                // The host hangs up; the guest looks for the next greeting.
                Err(_) if which & 1 == 1 => return,
                Err(_) => {}
            }
        }
    }
});

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn look(frame: &Frame) {
    let _ = frame.hello();
    let _ = frame.credit();
    match frame.kind {
        Kind::Open => drop(frame.parse::<Request>()),
        Kind::End => drop(frame.parse::<Outcome>()),
        Kind::Resize => drop(frame.parse::<TerminalSize>()),
        Kind::Signal => drop(frame.parse::<i32>()),
        _ => {}
    }
    // What was understood is written in the same way.
    let mut again = Decoder::host([0; 16]);
    again.push(&encoded(&miosa_agent::wire::hello_ack([0; 16])));
    assert!(again.next_frame().unwrap().is_some());
    again.push(&encoded(frame));
    assert_eq!(again.next_frame().unwrap().as_ref(), Some(frame));
}
