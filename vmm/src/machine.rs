//! A machine: its memory, vCPUs and devices, and the few verbs that move it through its life. All verbs take `&self`
//! and may be called from any thread; they wait for each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::MachineConfig;
use crate::console::Hub;
use crate::error::{MachineError, Result};
use crate::lifecycle::{Event, Lifecycle, State, StopReason};

pub struct Machine {
    config: MachineConfig,
    life: Lifecycle,
}

/// What `ferry info` shows of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    pub state: State,
    pub config: MachineConfig,
}

/// What a machine's consoles are connected to. A device writes to a clone of its hub and attaches itself for input,
/// again after every rebuild.
#[derive(Clone, Default)]
pub struct Wiring {
    pub serial: Hub,
    pub console: Hub,
}

impl Machine {
    /// A machine with its kernel loaded, ready to start.
    pub fn create(config: &MachineConfig, _wiring: &Wiring) -> Result<Machine> {
        config.validate()?;
        Ok(Machine {
            config: config.clone(),
            life: Lifecycle::default(),
        })
    }

    pub fn start(&self) -> Result<()> {
        Err(MachineError::Host("machines do not run yet".into()))
    }

    /// Returns after every vCPU has stopped, with the time that this took.
    pub fn pause(&self) -> Result<Duration> {
        Err(MachineError::Host("machines do not run yet".into()))
    }

    pub fn resume(&self) -> Result<()> {
        Err(MachineError::Host("machines do not run yet".into()))
    }

    /// Ends the machine from any state; nothing happens when it has ended already.
    pub fn stop(&self, reason: StopReason) -> Result<()> {
        match self.life.apply(Event::Stop(reason)) {
            Err(refused) if !refused.state.is_final() => Err(refused.into()),
            _ => Ok(()),
        }
    }

    /// Presses the ACPI power button; whether the guest follows is its own decision.
    pub fn power_button(&self) -> Result<()> {
        Err(MachineError::Host("machines have no power button yet".into()))
    }

    /// Saves, rebuilds and restores in place, running or paused; returns how long the guest stood still.
    pub fn pulse(&self) -> Result<Duration> {
        Err(MachineError::Host("machines do not pulse yet".into()))
    }

    pub fn state(&self) -> State {
        self.life.state()
    }

    /// A receiver that always holds the newest state: how a server learns that the guest powered off or failed.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.life.watch()
    }

    /// Waits until `wanted` holds; None when the time is up first.
    pub fn wait(&self, wanted: impl Fn(&State) -> bool, limit: Duration) -> Option<State> {
        self.life.wait(wanted, limit)
    }

    pub fn info(&self) -> Info {
        Info {
            state: self.state(),
            config: self.config.clone(),
        }
    }
}
