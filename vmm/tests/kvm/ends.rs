//! The ways in which a guest ends, each with a kernel of a few bytes: 32-bit code at 1 MiB.

use ferry_images::tiny_kernel;
use ferry_vmm::config::MachineConfig;
use ferry_vmm::lifecycle::{State, StopReason};

use crate::harness::{Guest, config, skip};

fn ended(code: &[u8]) -> State {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, tiny_kernel(code)).unwrap();
    let config = MachineConfig {
        kernel: Some(kernel),
        ..config(2, "")
    };
    Guest::start(&config).end()
}

fn out(port: u16, value: u16, width: u8) -> Vec<u8> {
    let [port_low, port_high] = port.to_le_bytes();
    let [low, high] = value.to_le_bytes();
    // mov dx, port; mov ax, value; out dx, ax or al; hlt
    let out: &[u8] = if width == 2 { &[0x66, 0xef] } else { &[0xee] };
    [
        &[0x66, 0xba, port_low, port_high, 0x66, 0xb8, low, high],
        out,
        &[0xf4],
    ]
    .concat()
}

#[test]
fn power_off_reset_and_debug_exit_stop_the_machine_with_their_reason() {
    if skip() {
        return;
    }
    // SLP_EN and SLP_TYP 5 into PM1a_CNT.
    assert_eq!(
        ended(&out(0x604, 1 << 13 | 5 << 10, 2)),
        State::Stopped {
            reason: StopReason::PowerOff
        }
    );
    assert_eq!(
        ended(&out(0x64, 0xfe, 1)),
        State::Stopped {
            reason: StopReason::Reset
        }
    );
    assert_eq!(
        ended(&out(0xf4, 3, 1)),
        State::Stopped {
            reason: StopReason::DebugExit { code: 7 }
        }
    );
}

#[test]
fn a_triple_fault_fails_the_machine_and_shows_the_registers() {
    if skip() {
        return;
    }
    // The IDT is empty: the first exception is the last. mov eax, 0x1234; ud2
    let State::Failed { message } = ended(&[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x0b]) else {
        panic!("a triple fault is a failure");
    };
    assert!(message.contains("triple fault"), "{message}");
    assert!(message.contains("rax=0x1234"), "{message}");
    assert!(
        message.contains("rip=0x100005") && message.contains("0f 0b"),
        "{message}"
    );
}

#[test]
fn an_internal_error_of_kvm_fails_the_machine_and_shows_the_code() {
    if skip() {
        return;
    }
    // An instruction fetch from a device's address: nothing can execute there. jmp far into the PCI window.
    // mov eax, 0xd0000000; jmp eax
    let State::Failed { message } = ended(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]) else {
        panic!("code in a device's window is a failure");
    };
    assert!(
        message.contains("KVM") && message.contains("rip=0xd0000000"),
        "{message}"
    );
}
