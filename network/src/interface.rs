//! The few ioctls on network interfaces and TAP files that Ferry needs, each behind a safe function.
#![allow(unsafe_code)] // ioctl(2) takes raw pointers; the structs below are what the kernel expects.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Longest interface name without its NUL.
pub(crate) const NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// linux/sockios.h; libc has it for Android only.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// Interface names are looked up in the network namespace this socket was made in.
#[derive(Debug)]
pub(crate) struct Control(OwnedFd);

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is a plain C struct of integers and arrays; all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() > NAME_BYTES || name.contains(['\0', '/']) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl_request(fd: &impl AsRawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every request number used in this file takes a pointer to an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(request)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn ioctl_int(fd: &impl AsRawFd, number: libc::c_ulong, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the TUN requests used in this file take an int by value or through a pointer as written by the caller.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, value) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn ioctl_int_pointer(fd: &impl AsRawFd, number: libc::c_ulong, mut value: libc::c_int) -> io::Result<()> {
    // SAFETY: the TUN requests used in this file read one int through the pointer, which lives through the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, &raw mut value) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Control {
    pub(crate) fn new() -> io::Result<Control> {
        // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd was just returned by socket(2) and belongs to nobody else.
        Ok(Control(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn index(&self, name: &str) -> io::Result<i32> {
        let mut request = request(name)?;
        ioctl_request(&self.0, libc::SIOCGIFINDEX as _, &mut request)?;
        // SAFETY: SIOCGIFINDEX filled in this member.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    pub(crate) fn is_up(&self, name: &str) -> io::Result<bool> {
        Ok(self.flags(name)? & libc::IFF_UP as libc::c_short != 0)
    }

    fn flags(&self, name: &str) -> io::Result<libc::c_short> {
        let mut request = request(name)?;
        ioctl_request(&self.0, libc::SIOCGIFFLAGS as _, &mut request)?;
        // SAFETY: SIOCGIFFLAGS filled in this member.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    pub(crate) fn set_up(&self, name: &str, up: bool) -> io::Result<()> {
        let before = self.flags(name)?;
        let bit = libc::IFF_UP as libc::c_short;
        let after = if up { before | bit } else { before & !bit };
        if before == after {
            return Ok(());
        }
        let mut request = request(name)?;
        request.ifr_ifru.ifru_flags = after;
        ioctl_request(&self.0, libc::SIOCSIFFLAGS as _, &mut request)
    }

    pub(crate) fn mac(&self, name: &str) -> io::Result<[u8; 6]> {
        let mut request = request(name)?;
        ioctl_request(&self.0, libc::SIOCGIFHWADDR as _, &mut request)?;
        // SAFETY: SIOCGIFHWADDR filled in this member.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        let mut mac = [0u8; 6];
        for (to, from) in mac.iter_mut().zip(data) {
            *to = from as u8;
        }
        Ok(mac)
    }

    pub(crate) fn set_mac(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = request(name)?;
        let mut address = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: [0; 14],
        };
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        ioctl_request(&self.0, libc::SIOCSIFHWADDR as _, &mut request)
    }

    pub(crate) fn mtu(&self, name: &str) -> io::Result<u16> {
        let mut request = request(name)?;
        ioctl_request(&self.0, libc::SIOCGIFMTU as _, &mut request)?;
        // SAFETY: SIOCGIFMTU filled in this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u16::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
    }

    pub(crate) fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
        ioctl_request(&self.0, libc::SIOCSIFMTU as _, &mut request)
    }

    pub(crate) fn add_to_bridge(&self, bridge: &str, port: &str) -> io::Result<()> {
        let index = self.index(port)?;
        let mut request = request(bridge)?;
        request.ifr_ifru.ifru_ifindex = index;
        ioctl_request(&self.0, SIOCBRADDIF, &mut request)
    }
}

/// One queue of a TAP device: /dev/net/tun, not yet attached to an interface. Reads and writes never block.
pub(crate) fn open_tun() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
}

/// Attaches the file to the interface `name`, where "%d" stands for a number that the kernel chooses. Returns the
/// name that it got.
pub(crate) fn attach_tap(tun: &File, name: &str, flags: libc::c_int) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as libc::c_short;
    ioctl_request(tun, libc::TUNSETIFF as _, &mut request)?;
    let bytes = request.ifr_name.map(|c| c as u8);
    CStr::from_bytes_until_nul(&bytes)
        .ok()
        .and_then(|name| name.to_str().ok())
        .map(str::to_owned)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

pub(crate) fn set_header_bytes(tun: &File, bytes: usize) -> io::Result<()> {
    ioctl_int_pointer(tun, libc::TUNSETVNETHDRSZ as _, bytes as libc::c_int)
}

/// No offloads: the kernel hands over only whole, checksummed frames. The device asks for what its guest can take.
pub(crate) fn clear_offloads(tun: &File) -> io::Result<()> {
    ioctl_int(tun, libc::TUNSETOFFLOAD as _, 0)
}

pub(crate) fn set_carrier(tun: &impl AsRawFd, on: bool) -> io::Result<()> {
    ioctl_int_pointer(tun, libc::TUNSETCARRIER as _, libc::c_int::from(on))
}

/// A locally administered unicast address in the range that KVM guests customarily use.
pub fn random_mac() -> io::Result<[u8; 6]> {
    let mut tail = [0u8; 3];
    // SAFETY: the pointer and length describe `tail`, which lives through the call.
    let got = unsafe { libc::getrandom(tail.as_mut_ptr().cast(), tail.len(), 0) };
    if got != tail.len() as isize {
        return Err(io::Error::last_os_error());
    }
    let [a, b, c] = tail;
    Ok([0x52, 0x54, 0x00, a, b, c])
}
