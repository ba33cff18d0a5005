//! What a guest may ask of the machine through a device: to reset, to power off, to end with a code.

/// Something the guest wants done with the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineRequest {
    Reset,
    PowerOff,
    /// The debug-exit port; the code is (written value << 1) | 1.
    DebugExit {
        code: u32,
    },
}

/// Takes requests. Called on the vCPU thread that made the access: note it, wake somebody, return.
pub trait MachineEvents: Send + Sync {
    fn request(&self, request: MachineRequest);
}
