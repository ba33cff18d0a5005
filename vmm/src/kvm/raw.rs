//! The few ioctls that kvm-ioctls has no safe function for.
#![allow(unsafe_code)] // raw ioctls, and the two that kvm-ioctls marks unsafe

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn checked(ret: i32) -> io::Result<()> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Clears the bits set in `bitmap` from the dirty log and write-protects those pages again (bit 0 is `first_page`,
/// a multiple of 64). Only with manual protection; the log itself was read before.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, bitmap: &[u64]) -> io::Result<()> {
    if (bitmap.len() as u64) * 64 < u64::from(pages) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the bitmap is shorter than the pages it covers",
        ));
    }
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads ceil(pages/64) words from the bitmap, which is at least that long (checked above) and lives
    // through the call; it does not write through the pointer.
    checked(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut clear) })
}

/// A file with what KVM counts of this vCPU.
pub fn stats_fd(vcpu: &VcpuFd) -> io::Result<OwnedFd> {
    // SAFETY: the ioctl has no argument.
    let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
    checked(fd)?;
    // SAFETY: a new descriptor, which nobody else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Plugs `size` bytes at `host` into the guest, or changes the flags of a slot plugged in before.
///
/// # Safety
/// The mapping must stay as long as the VM or until the slot is removed.
pub unsafe fn set_memory(
    vm: &VmFd,
    slot: u32,
    guest: u64,
    size: u64,
    host: u64,
    flags: u32,
) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: host,
    };
    // SAFETY: passed on to our caller.
    unsafe { vm.set_user_memory_region(region) }
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// What KVM adds to the host's TSC for this vCPU.
pub fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: KVM writes 8 bytes to `value`, which outlives the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(value)
}

pub fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: KVM reads 8 bytes from `value`, which outlives the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}

/// The words of KVM's XSAVE area. `bytes` is what KVM_CAP_XSAVE2 said, or 0 for the classic 4 KiB.
pub fn get_xsave(vcpu: &VcpuFd, bytes: u32) -> io::Result<Vec<u32>> {
    let base = size_of::<kvm_xsave>();
    if bytes as usize <= base {
        let xsave = vcpu
            .get_xsave()
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        return Ok(xsave.region.to_vec());
    }
    let more = (bytes as usize - base).div_ceil(size_of::<u32>());
    let mut area = Xsave::new(more).map_err(|e| io::Error::other(format!("{e:?}")))?;
    // SAFETY: the area is `bytes` long, what KVM said it writes for every vCPU of this VM.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

/// Puts back what `get_xsave` gave, here or on a host with a larger or smaller area: the layout is the same, and what is
/// beyond this host's area must be unused.
pub fn set_xsave(vcpu: &VcpuFd, bytes: u32, words: &[u32]) -> io::Result<()> {
    let base = size_of::<kvm_xsave>() / size_of::<u32>();
    let here = (bytes as usize).div_ceil(size_of::<u32>()).max(base);
    if words.len() < base || words.iter().skip(here).any(|word| *word != 0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the guest uses {} bytes of XSAVE state, here are {}",
                words.len() * 4,
                here * 4
            ),
        ));
    }
    let mut words = words.to_vec();
    words.resize(here, 0);
    let mut area = Xsave::new(here - base).map_err(|e| io::Error::other(format!("{e:?}")))?;
    let (head, tail) = words.split_at(base);
    // SAFETY: only the contents of the region change, not the length that the wrapper keeps.
    unsafe { area.as_mut_fam_struct() }
        .xsave
        .region
        .copy_from_slice(head);
    area.as_mut_slice().copy_from_slice(tail);
    // SAFETY: KVM reads as many bytes as it said for this VM, and the area was checked to be that long.
    unsafe { vcpu.set_xsave2(&area) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}
