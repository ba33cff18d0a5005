//! The built-in guest's pure parts, compiled for the host and tested here: the same files, by path.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "the files are the guest's; this is not where they are used"
)]

#[path = "../builtin/src/content.rs"]
mod content;
#[path = "../builtin/src/goldbach.rs"]
mod goldbach;
#[path = "../builtin/src/http.rs"]
mod http;
#[path = "../builtin/src/journal.rs"]
mod journal;
#[path = "../builtin/src/line.rs"]
mod line;
#[path = "../builtin/src/orders.rs"]
mod orders;
#[path = "../builtin/src/pick.rs"]
mod pick;
#[path = "../builtin/src/plan.rs"]
mod plan;
#[path = "../builtin/src/table.rs"]
mod table;

use content::{Identity, Version, WORDS};
use journal::{BLOCK, Record, Scan, Super};
use plan::{End, Plan, Rate};

const V: Version = Version {
    version: 7,
    payload: 5,
};

fn page(random: bool) -> ([u64; WORDS], Identity) {
    let id = Identity {
        page: 1234,
        seed: 1,
        random,
    };
    let mut words = [0; WORDS];
    content::write(&mut words, id, V);
    (words, id)
}

#[test]
fn a_changed_bit_in_any_word_of_a_page_is_found_where_it_is() {
    for random in [false, true] {
        let (mut words, id) = page(random);
        assert_eq!(content::check(&words, id, V), Ok(()));
        for word in 0..WORDS {
            words[word] ^= 1 << (word % 64);
            let found = content::check(&words, id, V).expect_err("a changed bit was not seen");
            assert_eq!(
                (found.word, found.got, found.want),
                (word, words[word], words[word] ^ 1 << (word % 64))
            );
            words[word] ^= 1 << (word % 64);
        }
    }
}

#[test]
fn a_page_in_another_page_s_place_or_of_another_time_is_found() {
    let (words, id) = page(true);
    assert!(content::check(&words, Identity { page: 1235, ..id }, V).is_err());
    assert!(content::check(&words, Identity { seed: 2, ..id }, V).is_err());
    assert!(content::check(&words, id, Version { version: 8, ..V }).is_err());
    assert!(content::check(&words, id, Version { payload: 4, ..V }).is_err());
    assert!(
        content::check_header(&words, id, Version { version: 8, ..V }).is_err(),
        "a lost write to a hot page"
    );
}

#[test]
fn the_share_of_random_pages_is_what_was_asked_for() {
    for percent in [0, 30, 50, 100] {
        let random = (0..20_000).filter(|&p| content::is_random(p, 1, percent)).count() as u64;
        assert!(
            random.abs_diff(200 * percent) <= 300,
            "{percent} percent gave {random} of 20000"
        );
    }
}

#[test]
fn sequential_order_takes_every_page_in_turn() {
    let mut picker = pick::Picker::new(pick::Order::Sequential, 5, 1);
    assert_eq!(
        Vec::from_iter((0..7).map(|_| picker.next())),
        [0, 1, 2, 3, 4, 0, 1]
    );
}

#[test]
fn random_and_zipf_stay_in_range_and_zipf_is_steep() {
    for count in [1, 2, 3, 1000, 65_536, 99_999] {
        for order in [pick::Order::Random, pick::Order::Zipf] {
            let mut picker = pick::Picker::new(order, count, 3);
            let mut hits = vec![0u32; count as usize];
            for _ in 0..50_000 {
                hits[picker.next() as usize] += 1;
            }
            hits.sort_unstable_by(|a, b| b.cmp(a));
            let hottest: u32 = hits.iter().take(count.div_ceil(100) as usize).sum();
            match order {
                pick::Order::Zipf if count >= 1000 => {
                    assert!(hottest > 15_000, "1% of {count} pages: {hottest} of 50000")
                }
                pick::Order::Random if count >= 1000 => {
                    assert!(hottest < 5_000, "1% of {count} pages: {hottest} of 50000")
                }
                _ => {}
            }
        }
    }
}

#[test]
fn an_order_line_is_read_word_by_word() {
    let text = "work=allocator+gc memory=64M wws=30 rate=max catch-up=5ms order=zipf random=50 writers=2 heartbeat=100ms \
                classes=239@3.29,1189@.02075,rest@0.00638 run=5s exit=debug:3 ip=10.0.0.2/24 gw=10.0.0.1";
    let (plan, wrong) = Plan::read(text);
    assert_eq!(wrong, None);
    assert!(plan.works.allocator && plan.works.gc && !plan.works.spin);
    assert_eq!(
        (plan.memory, plan.rate, plan.writers),
        (Some(64 << 20), Rate::Max, 2)
    );
    assert_eq!(
        (plan.catch_up_ns, Plan::read("").0.catch_up_ns),
        (5_000_000, 100_000_000)
    );
    assert_eq!((plan.run_ns, plan.end), (Some(5_000_000_000), End::Debug(3)));
    assert_eq!(plan.address, Some(([10, 0, 0, 2], 24)));
    let classes = Vec::from_iter(plan.classes.iter().flatten().map(|c| (c.pages, c.rate_micro)));
    assert_eq!(
        classes,
        [(Some(239), 3_290_000), (Some(1189), 20_750), (None, 6_380)]
    );
}

#[test]
fn nonsense_is_named_and_leaves_the_default() {
    for bad in [
        "rate=fast",
        "catch-up=1ms",
        "wws=101",
        "memory=12Q",
        "work=dance",
        "heartbeat=0",
        "classes=5@x",
        "oops",
        "=",
        "exit=debug:300",
        "ip=10.0.0",
    ] {
        let (plan, wrong) = Plan::read(bad);
        assert_eq!(wrong, Some(bad));
        assert_eq!(
            (plan.rate, plan.wws_percent, plan.memory),
            (Rate::PerSecond(1000), 30, None),
            "{bad}"
        );
    }
    assert_eq!(orders::size_bytes("99999999999G"), None);
    assert_eq!(orders::duration_ns("99999999999999s"), None);
    assert_eq!(orders::decimal_micro("1.1234567"), None);
}

#[test]
fn a_line_is_json_whatever_is_put_into_it() {
    let mut line = line::Line::new();
    line.word("t", "un\"known\\\n\u{e9}")
        .number("n", u64::MAX)
        .hex("a", 0x10)
        .flag("f", true)
        .ranges("r", &[(1, 2), (3, 4)]);
    assert_eq!(
        std::str::from_utf8(line.finish()),
        Ok(
            "{\"t\":\"un\\\"known\\\\???\",\"n\":18446744073709551615,\"a\":\"0x10\",\"f\":true,\"r\":[[\"0x1\",\"0x2\"],[\"0x3\",\"0x4\"]]}\n"
        )
    );
}

#[test]
fn a_record_is_sound_or_nothing() {
    let record = Record {
        number: 42,
        flushed: 40,
        time_ns: 5,
        seed: 1,
        starts: 2,
    };
    let mut block = [0; BLOCK];
    record.write(&mut block);
    assert_eq!(Record::read(&block), Some(record));
    for byte in (0..BLOCK).step_by(37).chain([BLOCK - 8, BLOCK - 1]) {
        block[byte] ^= 1;
        assert_eq!(Record::read(&block), None, "byte {byte}");
        block[byte] ^= 1;
    }
    assert_eq!(Super::read(&block), None);
    assert_eq!(
        journal::crc32c(b"123456789"),
        0xe306_9283,
        "the check value of CRC-32C"
    );
}

#[test]
fn a_scan_goes_on_where_the_unbroken_run_of_records_ends() {
    let head = Super {
        capacity: 100,
        seed: 1,
        starts: 1,
    };
    let mut scan = Scan::EMPTY;
    let record = |number, flushed| {
        Some(Record {
            number,
            flushed,
            time_ns: 0,
            seed: 1,
            starts: 1,
        })
    };
    // 120 were flushed; of the group after it, 121 and 122 and 124 reached the disk, 123 did not.
    for number in (23..=122).chain([124]) {
        let flushed = if number > 120 { 120 } else { number - 1 };
        assert!(scan.take(&head, head.block_of(number), record(number, flushed)));
    }
    assert_eq!((scan.flushed, scan.end(), scan.last), (120, 122, 124));
    assert!(
        !scan.take(&head, 7, record(50, 49)),
        "a record in a place that is not its own"
    );
    assert!(scan.take(&head, 7, None));
}

#[test]
fn every_even_number_up_to_ten_thousand_is_split_into_two_primes() {
    let slow = |n: u64| n > 1 && (2..n).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    for n in (4..10_000).step_by(2) {
        let (p, q) = goldbach::split(n).expect("Goldbach was wrong");
        assert!(p + q == n && slow(p) && slow(q), "{n} = {p} + {q}");
    }
    for n in 0..20_000 {
        assert_eq!(goldbach::is_prime(n), slow(n), "{n}");
    }
}

#[test]
fn the_calculator_echoes_the_sequence_number_and_survives_nonsense() {
    let answer = |request| {
        let mut out = String::new();
        goldbach::answer(request, &mut out);
        out
    };
    assert_eq!(answer("100"), "100 = 3 + 97\n");
    assert_eq!(answer("7 28"), "7 28 = 5 + 23\n");
    assert_eq!(answer("9"), "9 = ?\n");
    for bad in ["", "x", "1 2 3", "-4", "99999999999999999999"] {
        assert_eq!(answer(bad), "?\n", "{bad}");
    }
}

#[test]
fn http_requests_are_cut_at_their_blank_line() {
    let get = b"GET /123 HTTP/1.1\r\nHost: x\r\n\r\nGET";
    let request = http::parse(get).expect("a whole request");
    assert_eq!(
        (request.length, request.size, request.close),
        (get.len() - 3, Some(123), false)
    );
    assert_eq!(http::parse(b"GET / HTTP/1.1\r\nHost"), None);
    let status = |text: &[u8]| http::parse(text).map(|r| (r.status, r.close));
    assert_eq!(
        status(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"),
        Some((http::Status::Ok, true))
    );
    assert_eq!(status(b"GET / HTTP/1.0\r\n\r\n"), Some((http::Status::Ok, true)));
    assert_eq!(
        status(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"),
        Some((http::Status::Ok, false))
    );
    assert_eq!(
        status(b"GET /x HTTP/1.1\r\n\r\n"),
        Some((http::Status::NotFound, false))
    );
    assert_eq!(
        status(b"POST / HTTP/1.1\r\n\r\n"),
        Some((http::Status::NotAllowed, true))
    );
    assert_eq!(
        status(b"\xff\xfe\r\n\r\n"),
        Some((http::Status::BadRequest, true))
    );
}

#[test]
fn a_log_block_gives_back_its_updates_or_nothing() {
    let head = table::LogHead {
        epoch: 3,
        sequence: 9,
        committed: 1000,
    };
    let updates = Vec::from_iter((0..table::UPDATES_PER_BLOCK as u32).map(|i| (i * 7, i + 1)));
    let mut block = [0; BLOCK];
    head.write(&updates, &mut block);
    let (found, list) = table::LogHead::read(&block).expect("a sound block");
    assert_eq!((found, Vec::from_iter(list)), (head, updates));
    for byte in (0..BLOCK).step_by(41).chain([BLOCK - 1]) {
        block[byte] ^= 0x80;
        assert!(table::LogHead::read(&block).is_none(), "byte {byte}");
        block[byte] ^= 0x80;
    }
    let header = table::Header {
        rows: 17,
        log_blocks: 256,
        epoch: 3,
        committed: 1000,
        seed: 1,
    };
    header.write(&mut block);
    assert_eq!(
        (table::Header::read(&block), header.table_blocks()),
        (Some(header), 2)
    );
    assert!(table::LogHead::read(&block).is_none());
    block[17] ^= 1;
    assert!(table::Header::read(&block).is_none() && table::Header::is_damaged(&block));
}

#[test]
fn a_row_in_another_row_s_place_is_found() {
    let row = table::row(5, 77, 1);
    assert_eq!(table::version_of(&row, 5, 1), Some(77));
    assert_eq!(table::version_of(&row, 6, 1), None);
    assert_eq!(table::version_of(&row, 5, 2), None);
    for word in 0..table::ROW_WORDS {
        let mut bad = row;
        bad[word] ^= 1;
        assert_eq!(table::version_of(&bad, 5, 1), None, "word {word}");
    }
}
