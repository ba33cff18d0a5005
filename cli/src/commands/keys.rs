//! `ferry keys`: a private authority and a certificate for each host, so that TLS costs a user one command.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// Make an authority (once) and a key and certificate for each host.
///
/// DIR/ca.pem and DIR/ca.key are the authority; keep ca.key to yourself. DIR/HOST/ has what that host needs: copy it
/// there and name the copy with --tls on both `ferry receive` and `ferry migrate`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  ferry keys --dir keys alpha.lan beta.lan\n  scp -r keys/beta.lan beta.lan:/etc/ferry\n  \
                        beta$  ferry receive tcp://0.0.0.0:7070 --tls /etc/ferry --allow alpha.lan\n  \
                        alpha$ ferry migrate web tcp://beta.lan:7070 --tls keys/alpha.lan"
)]
pub struct KeysArgs {
    /// Where the authority and the hosts' folders are made.
    #[arg(long, default_value = "ferry-keys")]
    pub dir: PathBuf,
    /// Names of hosts, as peers will call them: a DNS name or an IP address.
    #[arg(required = true)]
    pub hosts: Vec<String>,
}

pub fn run(args: &KeysArgs) -> Result<()> {
    for host in &args.hosts {
        if host.is_empty() || host.starts_with('.') || host.contains('/') {
            bail!("{host:?} is not the name of a host; nothing was made");
        }
    }
    make_dir(&args.dir)?;
    let issuer = authority(&args.dir)?;
    for host in &args.hosts {
        let dir = args.dir.join(host);
        make_dir(&dir)?;
        let key = KeyPair::generate().context("could not make a key")?;
        let mut params = CertificateParams::new(vec![host.clone()])
            .with_context(|| format!("{host} cannot stand in a certificate"))?;
        params.distinguished_name.push(DnType::CommonName, host.as_str());
        params.use_authority_key_identifier_extension = true;
        params.key_usages.push(KeyUsagePurpose::DigitalSignature);
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ClientAuth);
        let certificate = params
            .signed_by(&key, &issuer)
            .with_context(|| format!("could not sign the certificate of {host}"))?;
        write(&dir.join("cert.pem"), &certificate.pem(), 0o644)?;
        write(&dir.join("key.pem"), &key.serialize_pem(), 0o600)?;
        fs::copy(args.dir.join("ca.pem"), dir.join("ca.pem"))
            .context("could not copy the authority's certificate")?;
        println!(
            "{}: copy this folder to {host} and name it there with --tls",
            dir.display()
        );
    }
    Ok(())
}

/// The authority in `dir`, made if it is not there yet.
fn authority(dir: &Path) -> Result<Issuer<'static, KeyPair>> {
    let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
    if cert_path.exists() || key_path.exists() {
        let key = fs::read_to_string(&key_path)
            .with_context(|| format!("could not read {}", key_path.display()))?;
        let key =
            KeyPair::from_pem(&key).with_context(|| format!("{} is no private key", key_path.display()))?;
        // Name and key are all that a signature needs of the authority, and the name is always the same.
        return Ok(Issuer::new(authority_params()?, key));
    }
    let key = KeyPair::generate().context("could not make the authority's key")?;
    let params = authority_params()?;
    let certificate = params
        .self_signed(&key)
        .context("could not sign the authority's certificate")?;
    write(&key_path, &key.serialize_pem(), 0o600)?;
    write(&cert_path, &certificate.pem(), 0o644)?;
    println!("{}: the authority; keep ca.key to yourself", dir.display());
    Ok(Issuer::new(params, key))
}

fn authority_params() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params
        .distinguished_name
        .push(DnType::CommonName, "Ferry private authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages.push(KeyUsagePurpose::KeyCertSign);
    params.key_usages.push(KeyUsagePurpose::CrlSign);
    Ok(params)
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("could not make the folder {}", dir.display()))
}

/// Never over an older file: a key that is in use somewhere must not be lost.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| {
            format!(
                "could not make {}; if it is there already, move it away or name another --dir",
                path.display()
            )
        })?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("could not write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_call_keeps_the_authority_and_never_overwrites_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let args = |host: &str| KeysArgs {
            dir: dir.path().join("keys"),
            hosts: vec![host.to_owned()],
        };
        run(&args("alpha.lan")).unwrap();
        let authority = fs::read(dir.path().join("keys/ca.pem")).unwrap();
        run(&args("10.0.0.7")).unwrap();
        assert_eq!(
            authority,
            fs::read(dir.path().join("keys/10.0.0.7/ca.pem")).unwrap()
        );
        let key = fs::read(dir.path().join("keys/alpha.lan/key.pem")).unwrap();
        assert!(run(&args("alpha.lan")).is_err());
        assert_eq!(key, fs::read(dir.path().join("keys/alpha.lan/key.pem")).unwrap());
        assert!(run(&args("../etc")).is_err());
    }
}
