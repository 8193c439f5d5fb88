//! Copies of sparse disks into images stay thin.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::support::{need, try_run};

const DISK: u64 = 256 << 20;

/// Bytes of data in the source: most clusters of 2 MiB have some.
const DATA: u64 = 12 << 20;

/// A sparse disk with data in scattered pieces of whole blocks.
fn sparse(place: &Place, random: &mut Random) -> PathBuf {
    let path = place.path("sparse.raw");
    let file = fs::File::create(&path).unwrap();
    file.set_len(DISK).unwrap();
    let mut left = DATA;
    while left > 0 {
        let len = random.pick(&[4096, 8192, 65536, 262_144]).min(usize::try_from(left).unwrap());
        let at = random.below((DISK - len as u64) / 4096) * 4096;
        file.write_all_at(&random.bytes(len), at).unwrap();
        left -= len as u64;
    }
    path
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_sparse_copy_takes_the_space_of_its_data() {
    need!("a_sparse_copy_takes_the_space_of_its_data", "nbdcopy", "qemu-img");
    let place = Place::new();
    let source = sparse(&place, &mut Random::new(0x5eed_5031));
    let data = allocated(&source);
    for options in
        ["cluster_size=2M", "cluster_size=2M,compat=0.10", "cluster_size=65536", "cluster_size=4096"]
    {
        let (ours, theirs) = (place.path("ours.qcow2"), place.path("theirs.qcow2"));
        let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, text(&source), text(&theirs)];
        qemu_img(&convert);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&ours), &DISK.to_string()]);
        let fresh = allocated(&ours);
        let from = Server::serve(&[text(&source), "-r", "-f", "raw"]);
        let to = Server::serve(&[text(&ours)]);
        let copied = try_run("nbdcopy", &[&from.uri(""), &to.uri("")]);
        assert!(copied.status.success(), "{options}: {copied:?}");
        from.stop();
        to.stop();
        check(&ours);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&ours), text(&source)]);
        let (ours, theirs) = (allocated(&ours), allocated(&theirs));
        println!("{options}: data {data}, ours {ours}, qemu-img {theirs}");
        assert!(ours <= theirs + (2 << 20), "{options}: {ours} bytes, qemu-img takes {theirs}");
        let most = fresh + data + data / 8 + (1 << 20);
        assert!(ours <= most, "{options}: {ours} bytes for {data} of data, {fresh} before");
    }
}

/// What becomes zero within a cluster is a hole in the file, or keeps its space where it must.
#[test]
fn zeroes_within_a_cluster_take_no_space() {
    need!("zeroes_within_a_cluster_take_no_space", "qemu-img");
    let place = Place::new();
    let image = place.path("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", text(&image), "64M"]);
    let fresh = allocated(&image);
    let server = Server::serve(&[text(&image)]);
    let mut client = server.client(ReplyStyle::Structured);
    let mut model = vec![0; 64 << 20];
    let mut random = Random::new(0x5eed_5032);
    for (at, len) in [(1 << 20, 4096), (5 << 20, 8192), (9 << 20, 512)] {
        let data = random.bytes(len);
        client.write(at as u64, &data);
        model[at..at + len].copy_from_slice(&data);
    }
    // All around the data, from clusters that have no place into such that have.
    for (start, end) in [(4096, 1 << 20), ((1 << 20) + 4096, 5 << 20), ((5 << 20) + 8192, 9 << 20)] {
        for at in (start..end).step_by(300 << 10) {
            let len = (300 << 10).min(end - at) as u64;
            assert_eq!(client.call(Nbd::WriteZeroes, NO_FLAGS, at as u64, len).error, None);
        }
    }
    client.flush();
    let thin = allocated(&image);
    assert!(thin < fresh + (128 << 10), "{thin}, {fresh} before");
    client.write(20 << 20, &vec![7; 2 << 20]);
    client.flush();
    let full = allocated(&image);
    assert!(full >= thin + (2 << 20), "{thin}, {full}");
    let keep = client.call(Nbd::WriteZeroes, CommandFlags::NO_HOLE, 20 << 20, 1 << 20);
    assert_eq!(keep.error, None);
    client.flush();
    assert!(allocated(&image) >= full, "NO_HOLE keeps the space");
    let free = client.call(Nbd::WriteZeroes, CommandFlags::FUA, (20 << 20) + 4096, 1 << 20);
    assert_eq!(free.error, None);
    assert!(allocated(&image) <= full - (1 << 20) + 65536, "{} of {full}", allocated(&image));
    model[(21 << 20) + 4096..22 << 20].fill(7);
    assert!(read_all(&mut client, model.len()) == model);
    client.disconnect();
    server.stop();
    check(&image);
    place.compare("qcow2", &image, &model);
}
