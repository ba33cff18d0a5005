//! The devices of a Ferry machine: buses, serial, virtio over PCI. Neither KVM nor migration.
