//! Real images: what the source reads and the sink places makes an equal disk, with equal holes.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use ferry_devices::disk::{Disk, DiskFormat, DiskOptions};
use ferry_migration::block::{BlockId, Sink, Source, Span};
use ferry_migration::units::UnitSet;

use super::{DiskSink, DiskSource, Library};

const SIZE: u64 = (5 << 20) + 4096;

fn open(path: &Path, format: DiskFormat) -> Arc<Disk> {
    let mut options = DiskOptions::new(path);
    options.format = Some(format);
    Arc::new(Disk::open(&options).unwrap())
}

fn make(path: &Path, format: DiskFormat) -> Arc<Disk> {
    Disk::create(path, format, SIZE).unwrap();
    open(path, format)
}

/// One round: everything in `todo` crosses, as the engine would carry it.
fn round(source: &DiskSource, sink: &DiskSink, todo: &UnitSet) {
    let info = source.info();
    for (first, count) in todo.runs() {
        let span = Span {
            block: info.id,
            first,
            count: count as u32,
        };
        source.take(&[span]).unwrap();
        let mut zero = vec![false; count as usize];
        source.find_zeroes(span, &mut zero).unwrap();
        for (unit, zero) in (first..).zip(zero) {
            let span = Span {
                block: info.id,
                first: unit,
                count: 1,
            };
            let mut data = vec![0; info.span_bytes(span)];
            source.read(span, &mut data).unwrap();
            if zero {
                assert!(data.iter().all(|byte| *byte == 0));
                sink.place_zeroes(span).unwrap();
            } else {
                sink.place(span, &data).unwrap();
            }
        }
    }
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

#[test]
fn a_disk_crosses_with_its_holes_its_late_writes_and_its_discards() {
    for (from, to) in [
        (DiskFormat::Raw, DiskFormat::Qcow2),
        (DiskFormat::Qcow2, DiskFormat::Raw),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let here = make(&dir.path().join("here"), from);
        let there = make(&dir.path().join("there"), to);
        here.write_at(&[1; 200_000], 70_000).unwrap();
        here.write_at(&[2; 4096], SIZE - 4096).unwrap();
        let source = DiskSource::new(BlockId(3), "disk 0".into(), Arc::clone(&here));
        let sink = DiskSink::new(BlockId(3), "disk 0".into(), Arc::clone(&there), None);
        assert_eq!(source.info(), sink.info());

        source.start_tracking().unwrap();
        let first = source.first_pass().unwrap();
        assert!(first.count() < 10, "holes are left out: {}", first.count());
        round(&source, &sink, &first);
        here.write_at(&[3; 1000], 3 << 20).unwrap();
        here.punch(65536, 65536).unwrap();
        let mut late = UnitSet::empty(source.info().units());
        source.survey(&mut late).unwrap();
        assert_eq!(late.runs().collect::<Vec<_>>(), [(1, 1), (48, 1)]);
        // A delivery that fails is put back and found again.
        source
            .take(&[Span {
                block: BlockId(3),
                first: 1,
                count: 1,
            }])
            .unwrap();
        source.put_back(&[Span {
            block: BlockId(3),
            first: 1,
            count: 1,
        }]);
        late.clear();
        source.survey(&mut late).unwrap();
        assert_eq!(late.count(), 2);
        round(&source, &sink, &late);
        late.clear();
        source.survey(&mut late).unwrap();
        assert!(late.is_empty());
        source.stop_tracking();

        there.flush().unwrap();
        assert!(content(&here) == content(&there));
        let blocks = std::fs::metadata(there.path()).unwrap().blocks();
        assert!(
            blocks * 512 < 1 << 20,
            "holes stay holes: {blocks} sectors are in use"
        );
    }
}

#[test]
fn a_cluster_of_the_base_image_travels_as_its_name_alone() {
    let dir = tempfile::tempdir().unwrap();
    let base = make(&dir.path().join("base"), DiskFormat::Raw);
    base.write_at(&[7; 65536], 2 * 65536).unwrap();
    base.write_at(&[8; 65536], 5 * 65536).unwrap();
    drop(base);
    let library = Arc::new(Library::of(&dir.path().join("base")).unwrap());
    let there = make(&dir.path().join("there"), DiskFormat::Raw);
    let sink = DiskSink::new(BlockId(0), "disk 0".into(), Arc::clone(&there), Some(library));
    use ferry_migration::block::Name;
    assert!(sink.place_known(9, &Name::of(&[7; 65536])).unwrap());
    assert!(!sink.place_known(10, &Name::of(&[9; 65536])).unwrap());
    let mut cluster = vec![0; 65536];
    there.read_at(&mut cluster, 9 * 65536).unwrap();
    assert!(cluster.iter().all(|byte| *byte == 7));

    // While it serves as a library nobody of ours may write to it; a program that does all the same is not believed.
    let path = dir.path().join("base");
    assert!(Disk::open(&DiskOptions::new(&path)).is_err());
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[6; 10], 5 * 65536).unwrap();
    assert!(!sink.place_known(11, &Name::of(&[8; 65536])).unwrap());
}
