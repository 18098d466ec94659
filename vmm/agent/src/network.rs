//! The guest's interfaces, by the old ioctls: a netlink library would be larger than the rest of the agent.

use std::io::{Error, Result};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The network device, where there is one.
const DEVICE: &str = "eth0";
/// QEMU's user network is always the same.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

pub(crate) fn bring_up_loopback() -> Result<()> {
    // Going up gives it 127.0.0.1.
    Interface::named("lo")?.up()
}

/// Nothing to do without a network device.
pub(crate) fn bring_up_user_network() -> Result<()> {
    if !has_device() {
        return Ok(());
    }
    let interface = Interface::named(DEVICE)?;
    interface.set_address(libc::SIOCSIFADDR, ADDRESS)?;
    interface.set_address(libc::SIOCSIFNETMASK, NETMASK)?;
    interface.up()?;
    interface.add_default_route(GATEWAY)?;
    let existing = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    if existing.trim().is_empty() {
        let _ = std::fs::remove_file("/etc/resolv.conf");
        std::fs::write("/etc/resolv.conf", format!("nameserver {NAME_SERVER}\n"))?;
    }
    Ok(())
}

/// Gives the network device another hardware address; nothing to do without one. It stays up: virtio's can do that.
pub(crate) fn set_mac(mac: [u8; 6]) -> Result<()> {
    if has_device() { Interface::named(DEVICE)?.set_mac(mac) } else { Ok(()) }
}

fn has_device() -> bool {
    Path::new("/sys/class/net").join(DEVICE).exists()
}

struct Interface {
    socket: OwnedFd,
    request: libc::ifreq,
}

impl Interface {
    fn named(name: &str) -> Result<Interface> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: ifreq is plain old data, for which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // One byte stays zero: the kernel wants a terminated name.
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(Interface { socket, request })
    }

    fn up(&self) -> Result<()> {
        let mut request = self.request;
        // SAFETY: the request is a valid ifreq that outlives the call, and may be written to.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) })?;
        // SAFETY: the call above has made the flags the union's valid member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        // SAFETY: the request is a valid ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })
    }

    fn set_address(&self, what: libc::c_ulong, address: Ipv4Addr) -> Result<()> {
        let mut request = self.request;
        request.ifr_ifru.ifru_addr = as_sockaddr(address);
        // SAFETY: the request is a valid ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), what as _, &request) })
    }

    fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        let mut request = self.request;
        // SAFETY: the request is a valid ifreq that outlives the call, and may be written to.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFHWADDR as _, &mut request) })?;
        // SAFETY: the call above has made the hardware address the union's valid member.
        let mut address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let mac = mac.map(|byte| byte as libc::c_char);
        if address.sa_data[..6] == mac {
            return Ok(());
        }
        address.sa_data[..6].copy_from_slice(&mac);
        request.ifr_ifru.ifru_hwaddr = address;
        // SAFETY: the request is a valid ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFHWADDR as _, &request) })
    }

    fn add_default_route(&self, gateway: Ipv4Addr) -> Result<()> {
        // SAFETY: rtentry is plain old data, for which all zeroes is a value (its pointers may be null).
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = as_sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = as_sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = as_sockaddr(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: the route is a valid rtentry that outlives the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT as _, &route) })
    }
}

fn check(result: libc::c_int) -> Result<()> {
    if result == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn as_sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    // struct sockaddr_in: family, port (2 bytes), address (4 bytes, network order).
    // SAFETY: sockaddr is plain old data, for which all zeroes is a value.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = libc::AF_INET as libc::sa_family_t;
    for (to, from) in generic.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    generic
}
