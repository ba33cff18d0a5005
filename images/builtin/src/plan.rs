//! The orders as a plan: every key, its meaning and its default. Pure.

use crate::orders::{
    address, address_and_prefix, decimal_micro, duration_ns, list, percent, size_bytes, value,
};
use crate::pick::Order;

pub const MAX_CLASSES: usize = 16;
/// What a stall of more than this has put off is not caught up with, unless told otherwise.
pub const CATCH_UP_NS: u64 = 100_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rate {
    Off,
    PerSecond(u64),
    Max,
}

/// Pages of one write rate: `pages` (None: all that are left), each written `rate_micro` / 1e6 times a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Class {
    pub pages: Option<u64>,
    pub rate_micro: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Works {
    pub spin: bool,
    pub allocator: bool,
    pub gc: bool,
    pub disk: bool,
    pub database: bool,
    pub web: bool,
    pub calc: bool,
    pub ping: bool,
    pub entropy: bool,
    pub console: bool,
    pub balloon: bool,
    pub blocks: bool,
}

impl Works {
    const NONE: Works = Works {
        spin: false,
        allocator: false,
        gc: false,
        disk: false,
        database: false,
        web: false,
        calc: false,
        ping: false,
        entropy: false,
        console: false,
        balloon: false,
        blocks: false,
    };

    /// Whether any of it needs the disk.
    pub fn uses_disk(self) -> bool {
        self.disk || self.database || self.blocks
    }

    /// Whether any of it needs the network.
    pub fn network(self) -> bool {
        self.web || self.calc || self.ping
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    PowerOff,
    Reset,
    TripleFault,
    InvalidOpcode,
    Emulation,
    Debug(u8),
}

impl End {
    pub fn name(self) -> &'static str {
        match self {
            End::PowerOff => "poweroff",
            End::Reset => "reset",
            End::TripleFault => "triple",
            End::InvalidOpcode => "ud2",
            End::Emulation => "emulation",
            End::Debug(_) => "debug",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub works: Works,
    pub heartbeat_ns: u64,
    /// How long to run, and how to end then.
    pub run_ns: Option<u64>,
    pub end: End,
    /// None: half of what is free.
    pub memory: Option<u64>,
    pub heap: Option<u64>,
    pub allocations: Rate,
    pub wws_percent: u64,
    pub rate: Rate,
    /// How much of a stall the writers catch up with.
    pub catch_up_ns: u64,
    pub order: Order,
    pub random_percent: u64,
    pub writers: usize,
    pub whole_pages: bool,
    pub check: Rate,
    pub seed: u64,
    /// Size of a new journal; None: 64 MiB or what the disk has.
    pub journal: Option<u64>,
    pub journal_new: bool,
    pub records: Rate,
    pub group: usize,
    pub rows: u64,
    pub update_percent: u64,
    pub updates: Rate,
    pub address: Option<([u8; 4], u8)>,
    pub gateway: Option<[u8; 4]>,
    pub body: u64,
    pub connections: usize,
    /// Entropy buffers and console lines per second, each.
    pub pieces: Rate,
    /// Pages that the balloon's worker plays with, and how many it writes per second.
    pub stock: u64,
    pub churn: Rate,
    /// Raw requests to the disk: whether they write, how long each is, how many at a time.
    pub writes: bool,
    pub request: u64,
    pub depth: usize,
    pub classes: [Option<Class>; MAX_CLASSES],
}

/// The words that could not be understood, as `key=value`.
pub type Wrong<'a> = Option<&'a str>;

impl Plan {
    /// Reads a plan; whatever is wrong keeps its default and is named.
    pub fn read(text: &str) -> (Plan, Wrong<'_>) {
        let mut plan = Plan {
            works: Works::NONE,
            heartbeat_ns: 100_000_000,
            run_ns: None,
            end: End::PowerOff,
            memory: None,
            heap: None,
            allocations: Rate::Max,
            wws_percent: 30,
            rate: Rate::PerSecond(1000),
            catch_up_ns: CATCH_UP_NS,
            order: Order::Sequential,
            random_percent: 50,
            writers: 0,
            whole_pages: true,
            check: Rate::PerSecond(20_000),
            seed: 1,
            journal: None,
            journal_new: false,
            records: Rate::PerSecond(200),
            group: 8,
            rows: 65_536,
            update_percent: 10,
            updates: Rate::PerSecond(2000),
            address: None,
            gateway: None,
            body: 1 << 20,
            connections: 16,
            pieces: Rate::PerSecond(200),
            stock: 8 << 20,
            churn: Rate::PerSecond(1000),
            writes: false,
            request: 4096,
            depth: 16,
            classes: [None; MAX_CLASSES],
        };
        let mut wrong = None;
        for word in text.split_ascii_whitespace() {
            let understood = match word.split_once('=') {
                Some((key, value)) => plan.take(key, value).is_some(),
                None => false,
            };
            if !understood {
                wrong = Some(word);
            }
        }
        if let Some(after) = value(text, "after").and_then(duration_ns) {
            plan.run_ns = Some(after);
        }
        (plan, wrong)
    }

    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "work" => self.works = works(value)?,
            "heartbeat" => self.heartbeat_ns = duration_ns(value).filter(|&ns| ns >= 1_000_000)?,
            "run" => self.run_ns = Some(duration_ns(value)?),
            "after" => _ = duration_ns(value)?,
            "exit" => self.end = end_by_exit(value)?,
            "fault" => {
                self.end = end_by_fault(value)?;
                self.run_ns = self.run_ns.or(Some(0));
            }
            "memory" => self.memory = Some(size_bytes(value)?),
            "heap" => self.heap = Some(size_bytes(value)?),
            "allocations" => self.allocations = rate(value)?,
            "wws" => self.wws_percent = percent(value)?,
            "rate" => self.rate = rate(value)?,
            "catch-up" => self.catch_up_ns = duration_ns(value).filter(|&ns| ns >= 4_000_000)?,
            "order" => self.order = Order::parse(value)?,
            "random" => self.random_percent = percent(value)?,
            "writers" => self.writers = value.parse().ok().filter(|n| (1..=256).contains(n))?,
            "touch" => self.whole_pages = choice(value, ["head", "page"])? == 1,
            "check" => self.check = rate(value)?,
            "seed" => self.seed = value.parse().ok()?,
            "classes" => self.classes = classes(value)?,
            "journal" if value == "new" => self.journal_new = true,
            "journal" => self.journal = Some(size_bytes(value)?),
            "records" => self.records = rate(value)?,
            "rows" => self.rows = value.parse().ok().filter(|n| (1..=1 << 24).contains(n))?,
            "update" => self.update_percent = percent(value)?,
            "updates" => self.updates = rate(value)?,
            "group" => self.group = value.parse().ok().filter(|n| (1..=16).contains(n))?,
            "ip" => self.address = Some(address_and_prefix(value)?),
            "gw" => self.gateway = Some(address(value)?),
            "body" => self.body = size_bytes(value)?,
            "connections" => self.connections = value.parse().ok().filter(|n| (1..=128).contains(n))?,
            "pieces" => self.pieces = rate(value)?,
            "stock" => self.stock = size_bytes(value)?,
            "churn" => self.churn = rate(value)?,
            "io" => self.writes = choice(value, ["read", "write"])? == 1,
            "request" => {
                let fits = |bytes: &u64| (4096..=65_536).contains(bytes) && bytes.is_multiple_of(4096);
                self.request = size_bytes(value).filter(fits)?;
            }
            "depth" => self.depth = value.parse().ok().filter(|n| (1..=32).contains(n))?,
            "cpus" => _ = value.parse::<u32>().ok()?,
            _ => return None,
        }
        Some(())
    }
}

fn choice(value: &str, names: [&str; 2]) -> Option<usize> {
    names.iter().position(|name| *name == value)
}

fn works(value: &str) -> Option<Works> {
    let mut works = Works::NONE;
    for name in value.split('+') {
        match name {
            "idle" => {}
            "spin" => works.spin = true,
            "allocator" => works.allocator = true,
            "gc" => works.gc = true,
            "disk" => works.disk = true,
            "database" => works.database = true,
            "web" => works.web = true,
            "calc" => works.calc = true,
            "ping" => works.ping = true,
            "entropy" => works.entropy = true,
            "console" => works.console = true,
            "balloon" => works.balloon = true,
            "blocks" => works.blocks = true,
            _ => return None,
        }
    }
    Some(works)
}

fn rate(value: &str) -> Option<Rate> {
    match value {
        "max" => Some(Rate::Max),
        "off" | "0" => Some(Rate::Off),
        number => number.parse().ok().map(Rate::PerSecond),
    }
}

fn end_by_exit(value: &str) -> Option<End> {
    match value.split_once(':') {
        Some(("debug", code)) => code.parse().ok().map(End::Debug),
        _ => (value == "poweroff").then_some(End::PowerOff),
    }
}

fn end_by_fault(value: &str) -> Option<End> {
    match value {
        "triple" => Some(End::TripleFault),
        "reset" => Some(End::Reset),
        "poweroff" => Some(End::PowerOff),
        "ud2" => Some(End::InvalidOpcode),
        "emulation" => Some(End::Emulation),
        _ => None,
    }
}

fn classes(value: &str) -> Option<[Option<Class>; MAX_CLASSES]> {
    list(value, |word| {
        let (pages, rate) = word.split_once('@')?;
        let pages = if pages == "rest" {
            None
        } else {
            Some(pages.parse().ok()?)
        };
        Some(Class {
            pages,
            rate_micro: decimal_micro(rate)?,
        })
    })
}
