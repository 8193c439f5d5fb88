//! What opens, what does not, and what is said then.

use super::*;

fn refusal(path: &Path, options: &FileOptions) -> String {
    match FileBackend::open(path, options) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with(&path.display().to_string()) && !text.contains('\n'), "{text}");
            text[path.display().to_string().len()..].to_owned()
        }
    }
}

fn options() -> FileOptions {
    FileOptions::default()
}

fn reading() -> FileOptions {
    FileOptions { read_only: true, ..options() }
}

#[test]
fn each_wrong_thing_is_named() {
    let folder = memory();
    let path = folder.path().join("thing");
    assert!(refusal(&path, &options()).contains("no such file (`nbdbridge create"));
    assert_eq!(refusal(Path::new("/dev/nothing/of/the/kind"), &options()), ": no such device");
    assert_eq!(refusal(folder.path(), &options()), ": is a directory, not a disk image or block device");
    assert!(refusal(Path::new("/dev/null"), &reading()).contains("is a character device"));

    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(refusal(&path, &options()).contains("is a pipe"));
    assert!(refusal(&path, &reading()).contains("is a pipe"));
    std::fs::remove_file(&path).unwrap();

    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(refusal(&path, &options()).contains("is a socket"));

    let link = folder.path().join("loop");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    assert!(refusal(&link, &options()).contains("Too many levels"));
    assert!(refusal(Path::new(""), &options()).contains("no such file"));
}

#[test]
fn creating_takes_nothing_over_and_leaves_nothing_behind() {
    let folder = disk();
    let path = image(&folder, 10_000_001);
    let metadata = std::fs::metadata(&path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((metadata.len(), metadata.blocks()), (10_000_001, 0), "sparse");
    assert!(matches!(create(&path, 1), Err(OpenError::Exists(_))));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 10_000_001);

    let huge = folder.path().join("huge");
    let text = create(&huge, u64::MAX).unwrap_err().to_string();
    assert!(text.contains("choose less"), "{text}");
    assert!(!huge.exists());
    assert!(create(folder.path().join("no/such"), 1).unwrap_err().to_string().contains("cannot create it"));
}

#[test]
fn without_permission_the_way_out_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = memory();
    let path = image(&folder, 4096);
    let path = path.as_path();
    let allow = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    allow(folder.path(), 0o755);
    std::thread::scope(|scope| {
        let nobody = |mode: u32, check: fn(&Path)| {
            allow(path, mode);
            scope
                .spawn(move || match crate::sys::become_nobody_on_this_thread() {
                    Ok(()) => check(path),
                    Err(error) => eprintln!("SKIP permissions: {error}"),
                })
                .join()
                .unwrap();
        };
        nobody(0o644, |path| {
            let text = refusal(path, &options());
            assert!(text.contains("for writing (it can be read: serve it with --read-only)"), "{text}");
            open(path, &reading());
        });
        nobody(0o600, |path| {
            assert!(refusal(path, &options()).ends_with("no permission to open it for writing"));
            assert!(refusal(path, &reading()).ends_with("no permission to open it for reading"));
        });
    });
}

#[test]
fn a_read_only_file_system_is_named() {
    let folder = memory();
    let path = image(&folder, 4096);
    let place = folder.path().to_str().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if !mount(&["--bind", place, place]) || !mount(&["-o", "remount,bind,ro", place]) {
                return;
            }
            assert!(refusal(&path, &options()).contains("read-only file system; serve it with --read-only"));
            open(&path, &reading());
        });
    });
}

#[test]
fn a_device_has_its_own_size_and_sectors_and_may_be_read_only() {
    let folder = disk();
    let path = image(&folder, 3 << 20);
    if let Some(device) = Loop::over(&path, &["--sector-size", "4096"]) {
        let backend = open(device.path(), &options());
        let geometry = backend.geometry();
        assert_eq!((geometry.size, geometry.min_block, geometry.preferred_block), (3 << 20, 1, 4096));
        assert!(!geometry.capabilities.contains(Capabilities::FILE_RANGE));
        assert_eq!(backend.disk.kind, Kind::Device(4096));
    }
    if let Some(device) = Loop::over(&path, &["--read-only"]) {
        assert!(refusal(device.path(), &options()).contains("serve it with --read-only"));
        let backend = open(device.path(), &reading());
        assert!(backend.geometry().read_only());
    }
}

#[test]
fn the_capabilities_follow_from_the_options() {
    let folder = disk();
    let path = image(&folder, 5);
    let backend = open(&path, &options());
    let geometry = backend.geometry();
    assert_eq!((geometry.size, geometry.preferred_block), (5, 4096));
    for capability in [
        Capabilities::FLUSH,
        Capabilities::FUA,
        Capabilities::TRIM,
        Capabilities::WRITE_ZEROES,
        Capabilities::FAST_ZERO,
        Capabilities::CACHE,
        Capabilities::MULTI_CONN,
        Capabilities::FILE_RANGE,
    ] {
        assert!(geometry.capabilities.contains(capability));
    }
    drop(backend);
    let caps = open(&path, &reading()).geometry().capabilities;
    assert!(caps.contains(Capabilities::READ_ONLY) && !caps.contains(Capabilities::TRIM));
    let caps = open(&path, &FileOptions { cache: CacheMode::None, ..options() }).geometry().capabilities;
    assert!(!caps.contains(Capabilities::FILE_RANGE));
}

#[test]
fn settings_that_cannot_be_honoured_are_refused() {
    // A plain file of a file system that has no O_DIRECT.
    let direct = FileOptions { cache: CacheMode::None, lock: false, ..reading() };
    let text = refusal(Path::new("/proc/version"), &direct);
    assert!(text.contains("O_DIRECT; serve it with --cache writeback"), "{text}");

    let folder = memory();
    let path = image(&folder, 4096);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            crate::sys::deny_on_this_thread(libc::SYS_io_uring_setup).unwrap();
            let text = refusal(&path, &FileOptions { aio: AioMode::IoUring, ..options() });
            assert!(text.contains("io_uring is not allowed here") && text.contains("--aio auto"), "{text}");
            open(&path, &options());
        });
    });
}
