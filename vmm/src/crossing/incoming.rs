//! The machine as the engine sees it at the side that it comes to.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_devices::disk::{Disk, DiskError, DiskOptions};
use ferry_migration::block::{BlockKind, Sink};
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::handover::{MachineId, RunPermit};
use ferry_migration::machine::{IncomingMachine, Offer};

use super::card::Description;
use super::images::Images;
use super::limits::{self, Allowed, Room};
use super::returning::{make_room, old_copy};
use super::{DiskSink, Library, MemorySink, Region};
use crate::config::{DiskFormat, MachineConfig, SerialTarget};
use crate::cpu::description::{HostFeatures, compatible};
use crate::kvm;
use crate::lifecycle::StopReason;
use crate::machine::Machine;
use crate::name::Name;
use crate::rundir::{Base, RunDir};
use crate::serve::{Outside, Serving};

/// How a receiver wants the machines that come.
#[derive(Debug, Clone)]
pub struct Reception {
    /// Where the runtime folders are made.
    pub base: Base,
    /// Where disk images are made.
    pub dir: PathBuf,
    pub format: Option<DiskFormat>,
    /// An image that the other side's disks may have been made from.
    pub base_image: Option<PathBuf>,
    pub serial: SerialTarget,
    /// Track writes of the machine's guest by dirty rings of so many entries, when it crosses on from here.
    pub dirty_ring: Option<u32>,
    /// Connects network devices to this bridge instead of the one that the machine names.
    pub bridge: Option<String>,
    /// Another name for the machine here.
    pub name: Option<Name>,
    pub allowed: Allowed,
}

/// A machine that is coming.
pub struct Arriving {
    reception: Reception,
    built: Option<Built>,
    arrived: Option<Arrived>,
    clock_behind: Option<Duration>,
    ran_after: Option<Duration>,
}

struct Built {
    dir: RunDir,
    outside: Outside,
    machine: Arc<Machine>,
    id: MachineId,
    running: bool,
    /// Images that were made for this machine; they go if it does not stay.
    images: Images,
    /// Disks that the machine may only read, opened to be filled. They are closed before the machine gets them.
    fillers: Vec<Arc<Disk>>,
    /// The machine's images are the other side's until the go-ahead.
    shared_storage: bool,
}

/// A machine that is here, with the right to run it.
pub struct Arrived {
    pub serving: Serving,
    pub id: MachineId,
    _permit: RunPermit,
}

fn failed(error: impl std::fmt::Display) -> Reason {
    Reason::new(Cause::Machine, error.to_string())
}

fn no_disk(error: DiskError) -> Reason {
    Reason::new(Cause::Data, error.to_string())
}

impl Arriving {
    pub fn new(reception: Reception) -> Arriving {
        Arriving {
            reception,
            built: None,
            arrived: None,
            clock_behind: None,
            ran_after: None,
        }
    }

    /// The machine, once it has been taken.
    pub fn arrived(&mut self) -> Option<Arrived> {
        self.arrived.take()
    }

    /// The configuration it gets here: no kernel to load, and places of this host instead of the other's.
    fn config_here(&self, description: &Description) -> MachineConfig {
        let mut config = description.config.clone();
        (config.kernel, config.initrd) = (None, None);
        config.serial = self.reception.serial.clone();
        config.dirty_ring = self.reception.dirty_ring;
        if config.console.is_some() {
            config.console = Some(SerialTarget::Null);
        }
        for net in &mut config.nets {
            if let Some(bridge) = &self.reception.bridge {
                net.bridge = Some(bridge.clone());
            }
            if net.bridge.is_some() {
                net.tap = None;
            }
        }
        if !description.shared_storage {
            for disk in &mut config.disks {
                disk.path = image_path(&self.reception.dir, &disk.path);
                if let Some(format) = self.reception.format {
                    disk.format = format;
                }
            }
        }
        config
    }

    fn name(&self, offer: &Offer) -> Result<Name, Reason> {
        match &self.reception.name {
            Some(name) => Ok(name.clone()),
            None => offer
                .card
                .name
                .parse()
                .map_err(|error| Reason::new(Cause::Protocol, format!("{error}"))),
        }
    }
}

/// An image keeps its file's name and nothing else of the path that a peer sent.
fn image_path(dir: &Path, theirs: &Path) -> PathBuf {
    dir.join(theirs.file_name().unwrap_or_else(|| std::ffi::OsStr::new("disk")))
}

impl IncomingMachine for Arriving {
    fn admit(&mut self, offer: &Offer) -> Result<(), Reason> {
        let description = Description::of(offer)?;
        let name = self.name(offer)?;
        if self
            .reception
            .base
            .entry(&name)
            .is_ok_and(|entry| entry.is_some_and(|entry| entry.pid.is_some()))
            && old_copy(&self.reception.base, &name, offer.card.machine).is_none()
        {
            return Err(Reason::new(
                Cause::Busy,
                format!("a machine named {name} runs there already"),
            ));
        }
        limits::check(
            offer,
            &description.config,
            &self.reception.allowed,
            Room::of_host(&self.reception.dir),
        )?;
        let host = kvm::open()
            .and_then(|kvm| HostFeatures::probe(&kvm))
            .map_err(failed)?;
        compatible(&description.guest, &host).map_err(|missing| {
            let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
            Reason::new(
                Cause::Incompatible,
                format!("the machine cannot run there: {}", missing.join("; ")),
            )
        })
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        let description = Description::of(offer)?;
        let config = self.config_here(&description);
        let name = self.name(offer)?;
        make_room(&self.reception.base, &name, offer.card.machine)?;
        let dir = self
            .reception
            .base
            .claim(&name)
            .map_err(|error| Reason::new(Cause::Busy, error.to_string()))?;
        let library = match &self.reception.base_image {
            Some(path) => Some(Arc::new(
                Library::of(path).map_err(|error| Reason::new(Cause::Data, error))?,
            )),
            None => None,
        };
        let mut images = Images::default();
        if !description.shared_storage {
            let sizes = offer
                .blocks
                .iter()
                .filter(|block| block.kind == BlockKind::Disk)
                .map(|block| block.bytes);
            for (disk, bytes) in config.disks.iter().zip(sizes) {
                let unsaid = || {
                    Reason::new(
                        Cause::Protocol,
                        "the other side does not say what format a disk has",
                    )
                };
                let format = Option::from(disk.format).ok_or_else(unsaid)?;
                images.make(&disk.path, format, bytes)?;
            }
        }
        let outside = Outside::connect(&dir, &config).map_err(failed)?;
        let machine = Machine::prepare(&config, &description.guest, outside.wiring()).map_err(failed)?;
        let machine = Arc::new(machine);
        let mut fillers = Vec::new();
        if !description.shared_storage {
            // Images that were made for this machine are this side's from the start; shared ones come with the go-ahead.
            for (disk, described) in machine.disks().iter().zip(&config.disks) {
                let filler = if disk.is_read_only() {
                    let mut options = DiskOptions::new(&described.path);
                    options.format = described.format.into();
                    Arc::new(Disk::open(&options).map_err(no_disk)?)
                } else {
                    disk.take_lock().map_err(no_disk)?;
                    disk.clone()
                };
                fillers.push(filler);
            }
        }
        let regions = Region::all(machine.ram());
        let mut sinks: Vec<Arc<dyn Sink>> = Vec::new();
        for (region, block) in regions.into_iter().zip(&offer.blocks) {
            sinks.push(Arc::new(MemorySink::new(block.id, region)));
        }
        let disks = offer.blocks.iter().filter(|block| block.kind == BlockKind::Disk);
        for (disk, block) in fillers.iter().cloned().zip(disks) {
            sinks.push(Arc::new(DiskSink::new(
                block.id,
                block.name.clone(),
                disk,
                library.clone(),
            )));
        }
        fillers.retain(|filler| machine.disks().iter().all(|disk| !Arc::ptr_eq(disk, filler)));
        self.built = Some(Built {
            dir,
            outside,
            machine,
            id: offer.card.machine,
            running: offer.card.running,
            images,
            fillers,
            shared_storage: description.shared_storage,
        });
        Ok(sinks)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Reason> {
        let built = self
            .built
            .as_mut()
            .ok_or_else(|| failed("there is no machine to restore into"))?;
        let records = ferry_devices::records::decode(state).map_err(failed)?;
        for filler in built.fillers.drain(..) {
            filler.release_lock().map_err(no_disk)?;
        }
        if !built.shared_storage {
            for disk in built.machine.disks() {
                disk.take_lock().map_err(no_disk)?;
            }
        }
        self.clock_behind = built.machine.restore(records).map_err(failed)?;
        built.images.complete();
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        let built = self
            .built
            .as_ref()
            .ok_or_else(|| failed("there is no machine to make durable"))?;
        for disk in built.machine.disks().iter().filter(|disk| disk.is_owned()) {
            disk.flush().map_err(|error| {
                Reason::new(
                    Cause::Data,
                    format!(
                        "the disk image {} could not be flushed: {error}",
                        disk.path().display()
                    ),
                )
            })?;
        }
        Ok(())
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), Reason> {
        let begun = Instant::now();
        let Some(Built {
            dir,
            outside,
            machine,
            id,
            running,
            images,
            fillers: _,
            shared_storage: _,
        }) = self.built.take()
        else {
            return Err(failed("there is no machine to run"));
        };
        // An error from here says "it does not run here and never will", and the other side then runs it. So everything
        // that can fail comes before the guest's first instruction, and nothing that can fail after it.
        for disk in machine.disks() {
            disk.take_lock().map_err(no_disk)?;
        }
        let serving = Serving::open(dir, outside, machine.clone(), id).map_err(failed)?;
        if running && let Err(error) = machine.resume() {
            let _ = machine.stop(StopReason::Requested);
            serving.wait();
            return Err(failed(error));
        }
        self.ran_after = running.then(|| begun.elapsed());
        machine.announce();
        images.keep();
        self.arrived = Some(Arrived {
            serving,
            id,
            _permit: permit,
        });
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.arrived
            .as_ref()
            .is_some_and(|arrived| arrived.serving.control().machine.state().is_final())
    }

    fn ran_after(&self) -> Option<Duration> {
        self.ran_after
    }

    fn clock_behind(&self) -> Option<Duration> {
        self.clock_behind
    }

    fn abort(&mut self) {
        if let Some(Built {
            dir,
            outside,
            machine,
            id: _,
            running: _,
            images,
            fillers,
            shared_storage: _,
        }) = self.built.take()
        {
            drop(fillers);
            drop(machine);
            drop(outside);
            drop(images);
            drop(dir);
        }
    }
}
