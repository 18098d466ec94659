//! Ends TCP connections to the outside, as `ss --kill` does: over netlink, by the kernel's socket diagnosis.

use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::boot;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// One bit for each state of TCP but these: listening, closed, and closed in order with only late packets to come.
const CONNECTIONS: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// `idiag_timer` of what is left of a connection that is closed on this side: it has no owner, and cannot be ended.
const REMAINS: u8 = 3;
/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// The header and `struct inet_diag_req_v2`.
const REQUEST_LEN: u32 = 16 + 56;
/// More than the kernel puts in one answer.
const ANSWER_LEN: usize = 64 * 1024;

/// `struct inet_diag_sockid`: ports (2 bytes each), addresses (16 bytes each), interface, and a cookie that no two have.
type Id = [u8; 48];

/// Ends all TCP connections but those whose other end is in the guest too. Their owners see `ECONNABORTED`.
///
/// # Errors
/// When the kernel cannot do it, or not for one of them: the first error of those; the others are ended.
pub(crate) fn end_those_to_the_outside() -> Result<()> {
    // What ends them is loaded and asked for tens of milliseconds where instructions are translated; mostly there are none.
    if !["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| may_have_connections(table)) {
        return Ok(());
    }
    boot::load_later()?;
    let kernel = Diagnosis::open()?;
    let mut outside = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let found = kernel.connections(family)?;
        outside.extend(found.into_iter().filter(|id| !is_inside(family, id)).map(|id| (family, id)));
    }
    let ended = outside.iter().map(|(family, id)| match kernel.end(*family, id) {
        // It has ended by itself.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        ended => ended,
    });
    ended.fold(Ok(()), Result::and)
}

/// Whether a table of the kernel's names a connection, or cannot be read. Without a protocol there is no table.
fn may_have_connections(table: &str) -> bool {
    match std::fs::read_to_string(table) {
        Ok(text) => text.lines().skip(1).any(is_connection),
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// Whether a line of such a table is of a connection, and not of a socket that listens or has been closed: `sl`, own address,
/// other's, state in hexadecimal, …
fn is_connection(line: &str) -> bool {
    let state = line.split_ascii_whitespace().nth(3).and_then(|state| u32::from_str_radix(state, 16).ok());
    state.is_none_or(|state| state >= u32::BITS || CONNECTIONS >> state & 1 == 1)
}

/// Whether both ends are in the guest: on its loopback, or on one address.
fn is_inside(family: u8, id: &Id) -> bool {
    let (own, other) = (address(family, &id[4..20]), address(family, &id[20..36]));
    own.is_loopback() || own == other
}

fn address(family: u8, bytes: &[u8]) -> IpAddr {
    let mut sixteen = [0; 16];
    sixteen.copy_from_slice(bytes);
    let [a, b, c, d, ..] = sixteen;
    match libc::c_int::from(family) {
        libc::AF_INET => Ipv4Addr::new(a, b, c, d).into(),
        // A socket of version 6 may speak version 4.
        _ => Ipv6Addr::from(sixteen).to_canonical(),
    }
}

struct Diagnosis(OwnedFd);

impl Diagnosis {
    fn open() -> Result<Diagnosis> {
        let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
        Ok(Diagnosis(socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?))
    }

    fn connections(&self, family: u8) -> Result<Vec<Id>> {
        let mut found = Vec::new();
        self.ask(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, family, &[0; 48], |message| {
            // `struct inet_diag_msg`: family, state, timer, retransmissions (a byte each), then the id.
            if let Some((&[_, _, timer, _], rest)) = message.split_first_chunk()
                && let Some(id) = rest.first_chunk()
                && timer != REMAINS
            {
                found.push(*id);
            }
        })?;
        Ok(found)
    }

    fn end(&self, family: u8, id: &Id) -> Result<()> {
        self.ask(SOCK_DESTROY, libc::NLM_F_ACK, family, id, |_| {})
    }

    /// Asks the kernel one thing and hears it to the end.
    fn ask(&self, kind: u16, flags: libc::c_int, family: u8, id: &Id, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut request = Vec::with_capacity(REQUEST_LEN as usize);
        request.extend(REQUEST_LEN.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
        // Number and sender are for those who ask several things at once.
        request.extend([0; 8]);
        request.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
        request.extend(CONNECTIONS.to_ne_bytes());
        request.extend(id);
        send(self.0.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut answer = vec![0; ANSWER_LEN];
        loop {
            let len = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let mut rest = &answer[..len];
            while let Some((kind, message, more)) = first_message(rest) {
                match libc::c_int::from(kind) {
                    // Both begin with an error's negative number, or 0.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        let code = message.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return if code < 0 { Err(Error::from_raw_os_error(-code)) } else { Ok(()) };
                    }
                    _ => each(message),
                }
                rest = more;
            }
        }
    }
}

/// The first of some netlink messages: its kind and contents, and the others.
fn first_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let message = bytes.get(HEADER_LEN..len)?;
    Some((kind, message, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(own: &[u8], other: &[u8]) -> Id {
        let mut id = [7; 48];
        id[4..36].fill(0);
        id[4..4 + own.len()].copy_from_slice(own);
        id[20..20 + other.len()].copy_from_slice(other);
        id
    }

    #[test]
    fn connections_within_the_guest_are_told_from_others() {
        let four = |own: [u8; 4], other: [u8; 4]| is_inside(libc::AF_INET as u8, &id(&own, &other));
        let six = |own: &str, other: &str| {
            let [own, other] = [own, other].map(|text| text.parse::<Ipv6Addr>().unwrap().octets());
            is_inside(libc::AF_INET6 as u8, &id(&own, &other))
        };
        assert!(four([127, 0, 0, 1], [127, 0, 0, 1]) && four([127, 0, 1, 1], [127, 0, 0, 1]));
        assert!(four([10, 0, 2, 15], [10, 0, 2, 15]));
        assert!(!four([10, 0, 2, 15], [10, 0, 2, 2]));
        assert!(six("::1", "::1") && six("::ffff:127.0.0.1", "::ffff:127.0.0.1"));
        assert!(!six("fec0::15", "fec0::2") && !six("::ffff:10.0.2.15", "::ffff:10.0.2.2"));
    }

    #[test]
    fn the_kernels_table_tells_whether_there_is_any() {
        let line =
            |state: &str| format!("   0: 0F02000A:A3F2 0202000A:0050 {state} 00000000:00000000 00:00000000 00000000");
        assert!(["01", "02", "04", "08", "0B"].iter().all(|state| is_connection(&line(state))));
        assert!(["0A", "06", "07"].iter().all(|state| !is_connection(&line(state))));
        // What is not understood may be one.
        assert!(["", "xy", "FF"].iter().all(|state| is_connection(&line(state))));
        assert!(may_have_connections("/proc/self/mem") && !may_have_connections("/nonexistent"));
    }

    #[test]
    fn messages_are_taken_one_by_one() {
        let message =
            |kind: u16, len: u32, body: &[u8]| [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat();
        let two = [message(20, 17, &[1, 0, 0, 0]), message(3, 20, &[2; 4])].concat();
        let (kind, body, rest) = first_message(&two).unwrap();
        assert_eq!((kind, body), (20, &[1][..]));
        assert_eq!(first_message(rest), Some((3, &[2; 4][..], &[][..])));
        for bad in [message(20, 15, &[]), message(20, 99, &[]), message(20, u32::MAX, &[]), vec![0; 3], Vec::new()] {
            assert_eq!(first_message(&bad), None, "{bad:?}");
        }
    }
}
