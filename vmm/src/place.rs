//! The machine's place on the network changes hosts: gone from here before it may run there, announced where it runs.

use std::sync::{Mutex, PoisonError};

use ferry_network::announce::{Announcer, Schedule};
use ferry_network::frames::Identity;

use crate::error::Result;
use crate::machine::Machine;

/// Announcements that are still going out.
#[derive(Default)]
pub(crate) struct Announcers(Mutex<Vec<Announcer>>);

impl Machine {
    /// Takes the machine's interfaces down, so that what is sent to it finds nobody here and soon the other side.
    pub fn leave_network(&self) -> Result<()> {
        self.resources().leave_network()
    }

    /// The other way round, for a machine that stays.
    pub fn join_network(&self) -> Result<()> {
        self.resources().join_network()
    }

    /// Tells the network that the machine is here: at once from its TAPs, then again and again with growing gaps, and
    /// by the guest itself where its driver can. It runs already; what fails is logged and nothing else.
    pub fn announce(&self) {
        let mut announcers = self.announcers().0.lock().unwrap_or_else(PoisonError::into_inner);
        announcers.retain(|announcer| !announcer.is_finished());
        for (net, tap) in self.nets().iter().zip(&self.resources().taps) {
            net.announce();
            let neighbours = net.neighbours();
            let identity = Identity {
                mac: net.mac(),
                ipv4: neighbours.ipv4,
                ipv6: neighbours.ipv6,
                ipv6_router: neighbours.ipv6_router,
            };
            match tap.sender() {
                Ok(sender) => announcers.push(Announcer::start(sender, &identity, Schedule::default())),
                Err(error) => tracing::warn!("the machine is not announced on {}: {error}", tap.name()),
            }
        }
    }
}
