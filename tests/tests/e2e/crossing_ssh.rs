//! Over ssh nothing is set up and nothing stays open: a machine crosses, and a doubt is settled, through the other host's shell.

use ferry_tests::crossing::{Receiver, migrate, pair, runs_at, state_at};
use ferry_tests::relay::{Act, Point, Relay};
use ferry_tests::shell::Shell;

const WORK: &str = "work=allocator memory=4M rate=500";

#[test]
fn a_machine_crosses_through_the_other_hosts_shell_and_the_shell_ends() {
    let Some((here, there, guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    guest.wait_for_line("ready");
    drop(guest);
    let (mut from, mut to) = (&here, &there);
    for (to_there, back) in Shell::ways(&there).iter().zip(Shell::ways(&here)) {
        for way in [to_there, &back] {
            // It would cross, and then it does.
            let asked = migrate(
                from,
                "m",
                "ssh://there",
                &[&way.words()[..], &["--dry-run"]].concat(),
            );
            assert!(asked.success().stdout.contains("ssh://there would take m"));
            let ran = migrate(
                from,
                "m",
                "ssh://there",
                &[&way.words()[..], &["--verify"]].concat(),
            );
            let ran = ran.success();
            assert!(ran.stdout.starts_with("m is at ssh://there now"), "{ran:?}");
            assert!(runs_at(to, "m"));
            from.wait_until("nothing is left where it was", || from.remains().is_empty());
            (from, to) = (to, from);
        }
    }
    // A receiver that is not there: what the shell says is seen, and the machine is here.
    let ways = Shell::ways(to);
    for way in &ways {
        let words = [way.words()[0], way.words()[1], "--remote-ferry", "/nowhere/ferry"];
        let ran = migrate(from, "m", "ssh://there", &words);
        assert!(
            ran.code == 1
                && ran.stderr.contains("the machine is here")
                && ran.stderr.contains("/nowhere/ferry"),
            "{ran:?}"
        );
        assert!(runs_at(from, "m") && to.remains().is_empty());
    }
}

#[test]
fn a_doubt_is_settled_through_the_other_hosts_shell() {
    for (message, took_it) in [("Awake", true), ("Go", false)] {
        let Some((here, there, _)) = pair(WORK, &["--memory", "64M"]) else {
            return;
        };
        for way in Shell::ways(&there) {
            // It waits for the go-ahead longer than this test takes.
            let receiver = Receiver::start(&there, &there.file("there.serial"), &["--reconnect", "60s"]);
            let relay = Relay::at(receiver.port(), Point::first(message), Act::CutBefore, true);
            let ran = migrate(
                &here,
                "m",
                &relay.address,
                &["--reconnect", "0s", "--compress", "off"],
            );
            assert!(ran.code == 1 && ran.stderr.contains("ferry resolve"), "{ran:?}");
            let ask = [&["resolve", "m", "--ask", "ssh://there"], &way.words()[..]].concat();
            // Where nobody can be asked, nothing is settled.
            let nowhere = [&ask[..6], &["--remote-ferry", "/nowhere/ferry"]].concat();
            let unknown = here.ferry(nowhere);
            assert!(
                unknown.code == 1 && unknown.stderr.contains("nobody knows where m is"),
                "{unknown:?}"
            );
            assert_eq!(state_at(&here, "m").as_deref(), Some("paused"));
            let found = here.ferry(ask).success();
            if took_it {
                assert!(found.stdout.contains("m is at the other side"), "{found:?}");
                here.wait_until("it is gone here", || here.entry("m").is_none());
                assert!(runs_at(&there, "m"));
                break;
            }
            // The process that answered is not the one that still waits. That one comes too late, whatever it hears.
            assert!(found.stdout.contains("m is running here"), "{found:?}");
            assert!(runs_at(&here, "m") && !runs_at(&there, "m"));
            drop((relay, receiver));
            there.wait_until("nothing is left there", || !runs_at(&there, "m"));
            there.ferry(["list", "--all"]).success();
        }
    }
}
