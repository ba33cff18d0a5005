//! Writes the inputs that the fuzzer begins with into fuzz/corpus.
#![allow(clippy::unwrap_used)] // a tool for whoever works on the fuzz targets

use std::path::PathBuf;

fn main() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (number, (target, bytes)) in ferry_hostile::seeds().into_iter().enumerate() {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("seed-{number:03}")), bytes).unwrap();
    }
}
