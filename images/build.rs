//! Compiles the built-in guest (builtin/) and hands its path to the crate, which embeds it.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The guest has no operating system, but the host's target serves: only `core` is used, and these flags
/// make a static image out of it. So no other target has to be installed.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let guest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("builtin");
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("guest");
    for watched in ["src", "Cargo.toml", "Cargo.lock", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(watched).display());
    }
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(&guest)
        .args(["build", "--release", "--locked", "--quiet", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target_dir);
    clear_inherited(&mut cargo);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(&guest).join("\x1f"));
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!(
            "the built-in guest in {} did not compile ({status})",
            guest.display()
        )
        .into());
    }
    let image = target_dir.join(TARGET).join("release/guest");
    println!("cargo::rustc-env=FERRY_BUILTIN_GUEST={}", image.display());
    Ok(())
}

fn flags(guest: &Path) -> Vec<String> {
    let script = guest.join("link.ld");
    let linker = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
    ];
    let mut flags = vec!["-Crelocation-model=static".to_owned()];
    flags.extend(linker.iter().map(|option| format!("-Clink-arg={option}")));
    flags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    flags
}

/// What the outer build was told (flags, wrappers such as clippy's, another target or directory) is not
/// meant for the guest.
fn clear_inherited(cargo: &mut Command) {
    const NOT_FOR_THE_GUEST: [&str; 7] = [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
        "CLIPPY_ARGS",
        "CARGO_BUILD_RUSTFLAGS",
    ];
    for name in NOT_FOR_THE_GUEST {
        cargo.env_remove(name);
    }
    for (name, _) in env::vars_os() {
        let inherited = name.to_str().is_some_and(|name| {
            [
                "CARGO_FEATURE_",
                "CARGO_CFG_",
                "CARGO_PROFILE_",
                "CARGO_PKG_",
                "CARGO_MANIFEST_",
                "CARGO_TARGET_",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        });
        if inherited {
            cargo.env_remove(&name);
        }
    }
}
