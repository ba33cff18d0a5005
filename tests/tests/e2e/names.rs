//! One name is one machine.

use ferry_tests::host::{Host, skip_without_kvm};

#[test]
fn a_second_machine_of_the_same_name_is_refused_and_the_first_goes_on() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("twin", [""; 0]);
    guest.beat();
    for more in [&["--serial", "null"][..], &["--detach"]] {
        let second = host.ferry([&["run", "twin"], more].concat());
        assert_eq!(second.code, 1);
        let wanted = format!("runs already (process {})", guest.pid());
        assert!(
            second.stderr.contains(&wanted) && second.stderr.lines().count() == 1,
            "{second:?}"
        );
    }
    let last = guest.beat();
    assert_eq!(guest.beat(), last + 1);
    assert!(host.ferry(["list"]).success().stdout.contains("running"));
}

#[test]
fn of_several_that_start_at_once_one_wins() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let children: Vec<_> = (0..4)
        .map(|_| host.command(["run", "twin", "--detach"]).spawn().unwrap())
        .collect();
    let ran: Vec<_> = children
        .into_iter()
        .map(|c| ferry_tests::host::finish(c, ferry_tests::host::PATIENCE))
        .collect();
    assert_eq!(ran.iter().filter(|ran| ran.code == 0).count(), 1, "{ran:?}");
    assert_eq!(host.ferry(["list"]).success().stdout.lines().count(), 2);
}
