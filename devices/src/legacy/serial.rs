//! A 16550 serial port. The registers are vm-superio's; here are its input that is never lost and its saved state.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{SerialState, Trigger};

use crate::bus::BusDevice;
use crate::console_io::{ConsoleInput, ConsoleOutput, InputQueue};
use crate::irq::IrqLine;
use crate::log_once::LogOnce;
use crate::state::{Record, RecordKey, StateError, Stateful};

pub const COM1: Range<u64> = 0x3f8..0x400;
pub const COM1_IRQ: u32 = 4;
const REGISTER_COUNT: u64 = 8;
const LINE_STATUS: u8 = 5;
const DATA_READY: u8 = 1;

/// One serial port. Input that does not fit into its FIFO waits here, and travels with the state.
pub struct Serial {
    instance: u32,
    uart: Mutex<Uart>,
    waiting: InputQueue,
    irq: Arc<dyn IrqLine>,
    output_failed: LogOnce,
}

type Uart = vm_superio::Serial<Line, NoEvents, Output>;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.trigger();
        Ok(())
    }
}

/// Behind an Arc because a restore makes a new UART around the same output.
#[derive(Clone)]
struct Output(Arc<Mutex<ConsoleOutput>>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    waiting: Vec<u8>,
}

impl Serial {
    pub fn new(instance: u32, irq: Arc<dyn IrqLine>, output: ConsoleOutput) -> Self {
        let output = Output(Arc::new(Mutex::new(output)));
        let uart = Uart::new(Line(irq.clone()), output);
        Self {
            instance,
            uart: Mutex::new(uart),
            waiting: InputQueue::default(),
            irq,
            output_failed: LogOnce::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves waiting input into the FIFO once that is empty: a refill raises the interrupt anew, and a driver that
    /// stops reading in the middle of a FIFO still has its data-ready bit.
    fn refill(&self, uart: &mut Uart) {
        let room = uart.fifo_capacity();
        if uart.read(LINE_STATUS) & DATA_READY == 0 && !self.waiting.is_empty() {
            let bytes = self.waiting.take(room);
            // Zero are taken in loop mode only: the line is disconnected, and what comes in is put back.
            match uart.enqueue_raw_bytes(&bytes) {
                Ok(taken) if taken == bytes.len() => {}
                _ => self.put_back(&bytes),
            }
        }
    }

    fn put_back(&self, bytes: &[u8]) {
        let mut all = bytes.to_vec();
        all.extend(self.waiting.contents());
        self.waiting.replace(&all);
    }
}

impl ConsoleInput for Serial {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let taken = self.waiting.push(bytes);
        self.refill(&mut uart);
        taken
    }

    fn wait_for_room(&self, at_most: Duration) -> bool {
        self.waiting.wait_for_room(at_most)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0..REGISTER_COUNT, [value]) = (offset, data) {
            let mut uart = self.lock();
            *value = uart.read(offset as u8);
            if offset == 0 {
                self.refill(&mut uart);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // `rep outsb` arrives as several accesses of one byte; a wider one is the guest's mistake.
        if let (0..REGISTER_COUNT, [value]) = (offset, data) {
            let mut uart = self.lock();
            match uart.write(offset as u8, *value) {
                Ok(()) | Err(Error::FullFifo) => {}
                Err(Error::IOError(error)) => {
                    let text = || format!("output of the serial port was lost: {error}");
                    self.output_failed.warn(text);
                }
                Err(Error::Trigger(never)) => match never {},
            }
            // Leaving loop mode connects the line again.
            self.refill(&mut uart);
        }
    }
}

impl Stateful for Serial {
    fn key(&self) -> RecordKey {
        RecordKey::new("serial", self.instance)
    }

    fn save(&self) -> Result<Record, StateError> {
        let uart = self.lock();
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: fifo,
        } = uart.state();
        let saved = Saved {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            fifo,
            waiting: self.waiting.contents(),
        };
        Record::required(self.key(), 1, &saved)
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let Saved {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            fifo: in_buffer,
            waiting,
        } = record.read(&self.key(), 1)?;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let mut uart = self.lock();
        let output = uart.writer().clone();
        *uart = Uart::from_state(&state, Line(self.irq.clone()), NoEvents, output).map_err(|_| {
            StateError::Mismatch {
                name: record.name.clone(),
                why: "its FIFO is too long".to_owned(),
            }
        })?;
        self.waiting.replace(&waiting);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console_io::INPUT_LIMIT;
    use crate::testing::Line as TestLine;
    use proptest::prelude::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LCR: u64 = 3;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

    fn serial() -> (Serial, Arc<TestLine>, Sink) {
        let (line, sink) = (Arc::new(TestLine::default()), Sink::default());
        (Serial::new(0, line.clone(), Box::new(sink.clone())), line, sink)
    }

    fn get(serial: &Serial, register: u64) -> u8 {
        let mut data = [0];
        serial.read(register, &mut data);
        data[0]
    }

    /// Reads like a driver: while the line status says that there is data.
    fn read_some(serial: &Serial, at_most: usize) -> Vec<u8> {
        std::iter::from_fn(|| (get(serial, LSR) & 1 != 0).then(|| get(serial, DATA)))
            .take(at_most)
            .collect()
    }

    #[test]
    fn output_arrives() {
        let (serial, line, sink) = serial();
        serial.write(IER, &[2]);
        line.take();
        b"hello".iter().for_each(|byte| serial.write(DATA, &[*byte]));
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
        assert!(line.take() >= 1 || get(&serial, IIR) & 2 != 0);
    }

    #[test]
    fn input_far_longer_than_the_fifo_arrives_whole_with_an_interrupt_for_each_refill() {
        let (serial, line, _) = serial();
        serial.write(IER, &[1]);
        let sent: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
        assert_eq!(serial.push(&sent), sent.len());
        let mut got = Vec::new();
        while line.take() > 0 {
            assert_eq!(get(&serial, IIR) & 0xf, 4);
            // Linux reads at most 256 bytes per interrupt.
            got.extend(read_some(&serial, 256));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_full_port_says_how_much_it_took() {
        let (serial, _, _) = serial();
        let mut sent = 0;
        let chunk: Vec<u8> = (0..=255).collect();
        loop {
            let taken = serial.push(&chunk);
            sent += taken;
            if taken < chunk.len() {
                break;
            }
        }
        assert!(sent >= INPUT_LIMIT);
        assert!(!serial.wait_for_room(Duration::from_millis(1)));
        assert_eq!(read_some(&serial, usize::MAX).len(), sent);
        assert!(serial.wait_for_room(Duration::ZERO));
    }

    #[test]
    fn input_during_loop_mode_waits_until_the_line_is_connected() {
        let (serial, _, _) = serial();
        serial.write(MCR, &[0x10]);
        assert_eq!(serial.push(b"later"), 5);
        assert_eq!(get(&serial, LSR) & 1, 0);
        serial.write(MCR, &[0x0b]);
        assert_eq!(read_some(&serial, usize::MAX), b"later");
    }

    #[test]
    fn everything_travels_with_the_state_input_too() {
        let (old, _, _) = serial();
        for (register, value) in [
            (LCR, 0x83),
            (DATA, 1),
            (IER, 2),
            (LCR, 0x1b),
            (IER, 5),
            (MCR, 0x0b),
            (7, 0x5a),
        ] {
            old.write(register, &[value]);
        }
        let sent: Vec<u8> = (0..500u32).map(|n| n as u8).collect();
        old.push(&sent);
        let first = read_some(&old, 10);
        let saved = old.save().unwrap();

        let (new, line, sink) = serial();
        new.restore(&saved).unwrap();
        assert_eq!(new.save().unwrap(), saved);
        let rest = read_some(&new, usize::MAX);
        assert_eq!([first, rest].concat(), sent);
        assert!(line.take() > 0);
        assert_eq!(
            (get(&new, LCR), get(&new, IER), get(&new, MCR), get(&new, 7)),
            (0x1b, 5, 0x0b, 0x5a)
        );
        new.write(DATA, b"x");
        assert_eq!(*sink.0.lock().unwrap(), b"x");
    }

    #[test]
    fn a_fifo_that_lies_is_refused() {
        let (serial, _, _) = serial();
        let good = serial.save().unwrap();
        let mut body: Saved = good.read(&serial.key(), 1).unwrap();
        body.fifo = vec![0; 1000];
        let record = Record::required(serial.key(), 1, &body).unwrap();
        assert!(serial.restore(&record).is_err());
        assert_eq!(serial.save().unwrap(), good);
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(accesses in prop::collection::vec(
            (any::<bool>(), 0..12u64, prop::collection::vec(any::<u8>(), 0..4)), 0..200)) {
            let (port, _, _) = serial();
            for (is_write, offset, mut data) in accesses {
                port.push(&data);
                if is_write { port.write(offset, &data) } else { port.read(offset, &mut data) }
            }
            let saved = port.save().unwrap();
            let (new, _, _) = serial();
            new.restore(&saved).unwrap();
            prop_assert_eq!(new.save().unwrap(), saved);
        }
    }
}
