//! What a guest kept on its disk is checked after its machine was killed: by the guest's own last word, in both formats of image.

use std::process::Command;

use ferry_tests::crossing::start;
use ferry_tests::host::{Host, skip_without_kvm};

#[test]
fn what_a_killed_guest_had_acknowledged_is_in_its_image_and_more_is_not() {
    if skip_without_kvm() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let host = Host::new();
        let image = host.file("disk.img");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .args([image.as_os_str(), "64M".as_ref()])
            .status();
        assert!(
            made.is_ok_and(|status| status.success()),
            "qemu-img makes no image"
        );
        let image = image.to_str().unwrap();
        let disk = format!("path={image},format={format}");
        let work = "work=disk+database journal=4M rows=2048 updates=20000";
        let guest = start(&host, "m", work, &["--memory", "64M", "--disk", &disk]);
        // The log of updates was full and began anew at least twice.
        guest.wait_for("a saved table", |line| line["checkpoints"].as_u64() > Some(2));
        if format == "qcow2" {
            let busy = host.ferry(["load", "journal", image]);
            assert!(busy.code == 1 && busy.stderr.contains("in use"), "{busy:?}");
        }
        host.ferry(["kill", "m"]).success();
        let said = |what: &str| {
            guest
                .lines()
                .iter()
                .rev()
                .find_map(|line| line[what].as_u64())
                .unwrap()
        };
        for (what, flag, count) in [
            ("journal", "--acked", said("acked")),
            ("database", "--committed", said("committed")),
        ] {
            assert!(count > 0, "{what}");
            host.ferry(["load", what, image, flag, &count.to_string()])
                .success();
            let more = (count + 1_000_000).to_string();
            let ran = host.ferry(["load", what, image, flag, &more, "--json"]);
            assert!(
                ran.code == 1 && ran.stderr.contains("is damaged"),
                "{what}: {ran:?}"
            );
        }
    }
}
