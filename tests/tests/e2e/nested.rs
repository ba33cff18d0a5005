//! Stock Linux guests under genuine KVM, in an outer machine.
use ferry_tests::nested::{self, Job};
#[test]
fn outer_machine_offers_kvm() -> anyhow::Result<()> {
    let outcome = nested::run(Job::new(
        "ls -la /p; ls -l /dev/kvm > /out/kvm; cat /proc/meminfo | head -3; exit 0",
    ))?
    .success()?;
    println!("{}", outcome.console);
    assert!(outcome.text("kvm")?.contains("/dev/kvm"));
    Ok(())
}
