//! Every input that is kept does no harm: what the fuzzer found interesting, and what once went wrong.
#![allow(clippy::unwrap_used, clippy::panic)] // a test is where these belong

use std::path::PathBuf;
use std::sync::Mutex;

use ferry_hostile::TARGETS;

/// Panics, in whichever thread: a device's thread that dies takes no test with it.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

#[test]
fn nothing_that_is_kept_does_harm() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.lock().unwrap().push(info.to_string());
        usual(info);
    }));
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let mut bytes = 0;
    for target in &TARGETS {
        let mut files: Vec<PathBuf> = std::fs::read_dir(corpus.join(target.name))
            .unwrap_or_else(|error| panic!("{} has no corpus: {error}", target.name))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{} has no corpus", target.name);
        for file in files {
            let input = std::fs::read(&file).unwrap();
            bytes += input.len();
            let outcome = std::panic::catch_unwind(|| (target.run)(&input));
            let panics = std::mem::take(&mut *PANICS.lock().unwrap());
            assert!(
                outcome.is_ok() && panics.is_empty(),
                "{}: {panics:?}",
                file.display()
            );
        }
    }
    assert!(
        bytes < 1 << 20,
        "the corpus has grown to {bytes} bytes; keep less"
    );
}
