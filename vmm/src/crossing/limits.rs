//! What a receiver lets a peer ask for. Looked at before anything is allocated.

use std::path::Path;

use ferry_migration::block::BlockKind;
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::machine::Offer;

use crate::config::MachineConfig;
use crate::size::ByteSize;

/// `None`: as much as the host has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    pub memory_bytes: Option<u64>,
    pub disk_bytes: Option<u64>,
    pub cpus: Option<u32>,
}

/// What the host has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) memory_bytes: u64,
    pub(super) disk_bytes: u64,
}

impl Room {
    pub(super) fn of_host(disks: &Path) -> Room {
        let available = std::fs::read_to_string("/proc/meminfo")
            .unwrap_or_default()
            .lines()
            .find_map(|line| {
                line.strip_prefix("MemAvailable:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .trim()
                    .parse::<u64>()
                    .ok()
            });
        let free = rustix::fs::statvfs(disks).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        Room {
            memory_bytes: available.map_or(u64::MAX, |kib| kib * 1024),
            disk_bytes: free.unwrap_or(u64::MAX),
        }
    }
}

/// One sentence if the machine is too big for what is allowed or for what is there.
pub(super) fn check(
    offer: &Offer,
    config: &MachineConfig,
    allowed: &Allowed,
    room: Room,
) -> Result<(), Reason> {
    let memory = config.memory.0;
    let disks = offer
        .blocks
        .iter()
        .filter(|block| block.kind == BlockKind::Disk)
        .map(|block| block.bytes);
    let disks = disks.fold(0, u64::saturating_add);
    if let Some(most) = allowed.cpus
        && config.cpus > most
    {
        let sentence = format!(
            "the machine has {} CPUs, and this receiver takes at most {most}",
            config.cpus
        );
        return Err(Reason::new(Cause::NotAllowed, sentence));
    }
    let over = |what: &str, wanted: u64, most: Option<u64>, there: u64, short: Cause| {
        if let Some(most) = most
            && wanted > most
        {
            let (wanted, most) = (ByteSize(wanted), ByteSize(most));
            let sentence =
                format!("the machine has {wanted} of {what}, and this receiver takes at most {most}");
            return Err(Reason::new(Cause::NotAllowed, sentence));
        }
        if wanted > there {
            let (wanted, there) = (ByteSize(wanted), ByteSize(there));
            return Err(Reason::new(
                short,
                format!("the machine has {wanted} of {what}, and {there} are free there"),
            ));
        }
        Ok(())
    };
    over(
        "memory",
        memory,
        allowed.memory_bytes,
        room.memory_bytes,
        Cause::NoMemory,
    )?;
    // A disk is made sparse: what does not fit is noticed when it is written. Its full size is what may be limited.
    over("disks", disks, allowed.disk_bytes, u64::MAX, Cause::NoSpace)?;
    if disks > 0 && room.disk_bytes == 0 {
        return Err(Reason::new(Cause::NoSpace, "there is no disk space left there"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::block::{BlockId, BlockInfo};
    use ferry_migration::handover::MachineId;
    use ferry_migration::machine::MachineCard;

    #[test]
    fn a_machine_that_is_too_big_is_refused_with_both_numbers() {
        let config = MachineConfig {
            cpus: 4,
            memory: ByteSize(1 << 30),
            ..MachineConfig::default()
        };
        let card = MachineCard {
            machine: MachineId([0; 16]),
            name: "m".into(),
            running: true,
            description: Vec::new(),
        };
        let disk = BlockInfo {
            id: BlockId(1),
            kind: BlockKind::Disk,
            name: "disk 0".into(),
            bytes: 10 << 30,
        };
        let offer = Offer {
            card,
            blocks: vec![disk],
        };
        let room = Room {
            memory_bytes: 2 << 30,
            disk_bytes: 1 << 30,
        };
        let ask =
            |allowed: Allowed, room| check(&offer, &config, &allowed, room).map_err(|reason| reason.cause);
        assert_eq!(ask(Allowed::default(), room), Ok(()));
        let cpus = Allowed {
            cpus: Some(3),
            ..Allowed::default()
        };
        assert_eq!(ask(cpus, room), Err(Cause::NotAllowed));
        let memory = Allowed {
            memory_bytes: Some(1 << 29),
            ..Allowed::default()
        };
        assert_eq!(ask(memory, room), Err(Cause::NotAllowed));
        let disk = Allowed {
            disk_bytes: Some(1 << 30),
            ..Allowed::default()
        };
        assert_eq!(ask(disk, room), Err(Cause::NotAllowed));
        assert_eq!(
            ask(
                Allowed::default(),
                Room {
                    memory_bytes: 1 << 29,
                    ..room
                }
            ),
            Err(Cause::NoMemory)
        );
        assert_eq!(
            ask(
                Allowed::default(),
                Room {
                    disk_bytes: 0,
                    ..room
                }
            ),
            Err(Cause::NoSpace)
        );
    }
}
