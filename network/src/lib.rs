//! The machine's place on the network: TAP devices and bridges, announcements.
