//! `nbdbridge create` and `nbdbridge info`.

use super::*;
use crate::support::{PROGRAM, one_line};

fn nbdbridge(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).env_remove("NBDBRIDGE_LOG").output().unwrap()
}

fn said(args: &[&str]) -> String {
    let output = nbdbridge(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(args: &[&str], status: i32) -> String {
    let output = nbdbridge(args);
    assert_eq!(output.status.code(), Some(status), "{args:?}");
    one_line(&output)
}

#[test]
fn images_that_we_make_are_in_order() {
    if !has_qemu_img("images_that_we_make_are_in_order") {
        return;
    }
    let place = Place::new();
    let image = place.path("disk.qcow2");
    for (cluster, size) in [("64K", "10G"), ("512", "64M"), ("2M", "1T"), ("4K", "0"), ("64K", "1000")] {
        let line = said(&["create", "-f", "qcow2", "--cluster-size", cluster, text(&image), size]);
        assert!(line.contains("qcow2 image"), "{line}");
        check(&image);
        let info = qemu_img(&["info", "--output=json", text(&image)]);
        let bytes = match size {
            "10G" => 10_u64 << 30,
            "64M" => 64 << 20,
            "1T" => 1 << 40,
            "1000" => 1024,
            _ => 0,
        };
        assert!(info.contains(&format!("\"virtual-size\": {bytes}")), "{info}");
        assert!(refused(&["create", "-f", "qcow2", text(&image), "1M"], 1).contains("exists already"));
        fs::remove_file(&image).unwrap();
    }
    place.file("base.raw", &[7; 1 << 20]);
    said(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&image)]);
    check(&image);
    place.compare("qcow2", &image, &[7; 1 << 20]);
    let over = place.path("over.qcow2");
    said(&["create", "-f", "qcow2", "-b", "disk.qcow2", text(&over), "2M"]);
    let info = qemu_img(&["info", "--output=json", text(&over)]);
    assert!(info.contains("\"backing-filename-format\": \"qcow2\"") && info.contains("2097152"), "{info}");

    let new = place.path("new");
    for (args, status, word) in [
        (&["-f", "qcow2", "-b", "missing"][..], 1, "missing"),
        (&["-f", "qcow2", "-b", "/dev/null", "-F", "raw"], 1, "/dev/null"),
        (&["-f", "qcow2", "--cluster-size", "512", "2T"], 1, "choose larger ones"),
        (&["-f", "qcow2", "--cluster-size", "1000", "2T"], 2, "power of two"),
        (&["-f", "qcow2"], 2, "SIZE"),
        (&["-b", "base.raw"], 2, "-f qcow2"),
        (&["-f", "vmdk", "1M"], 2, "qcow2"),
        (&["-f", "vdi", "1M"], 2, "qemu-img convert"),
        (&["-f", "qcow2", "--allocate", "1M"], 2, "qemu-img create"),
    ] {
        let line = refused(&[&["create", text(&new)], args].concat(), status);
        assert!(line.contains(word), "{line}");
        assert!(!new.exists(), "{args:?}");
    }
}

#[test]
fn info_tells_what_an_image_is() {
    if !has_qemu_img("info_tells_what_an_image_is") {
        return;
    }
    let place = Place::new();
    let (base, top) = (place.file("base \"x\".raw", &[7; 1 << 20]), place.path("top.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&top), "4M"]);
    let info = said(&["info", text(&top), "--map"]);
    for part in
        ["format:          qcow2", "4 MiB (4194304 bytes)", "64 KiB", "x\".raw (raw)", "data\n", "hole\n"]
    {
        assert!(info.contains(part), "{part}: {info}");
    }
    let json = said(&["info", text(&top), "--json", "--map"]);
    for part in
        ["\"size\": 4194304", "\"cluster-size\": 65536", "base \\\"x\\\".raw (raw)", "\"kind\": \"hole\""]
    {
        assert!(json.contains(part), "{part}: {json}");
    }
    if let Some(python) = tool(
        "info_tells_what_an_image_is",
        "python3",
        &["-c", "import json,sys; json.loads(sys.argv[1])", &json],
    ) {
        assert!(python.status.success(), "{json}");
    }
    assert!(said(&["info", text(&base)]).contains("raw"));
    assert!(said(&["info", "mem:1M"]).contains("1 MiB"));
    // One that is in use, and one that is not served.
    let server = Server::serve(&[text(&top)]);
    assert!(said(&["info", text(&top)]).contains("qcow2"));
    server.stop();
    let mut bytes = fs::read(&top).unwrap();
    bytes[79] |= 1;
    fs::write(&top, &bytes).unwrap();
    let output = nbdbridge(&["info", text(&top)]);
    assert!(output.status.success(), "it can be read");
    let info = String::from_utf8(output.stdout).unwrap();
    assert!(info.contains("warning:         is marked dirty") && info.contains("check -r all"), "{info}");
    bytes[78] |= 1;
    fs::write(&top, bytes).unwrap();
    let output = nbdbridge(&["info", text(&top)]);
    assert_eq!(output.status.code(), Some(1), "it cannot be served");
    let info = String::from_utf8(output.stdout).unwrap();
    assert!(
        info.contains("features:        dirty")
            && info.contains("problem:")
            && info.contains("qemu-img convert"),
        "{info}"
    );
    assert!(refused(&["info", text(&place.path("missing"))], 1).contains("no such file"));
    assert!(refused(&["info", text(&top), "--map"], 1).contains("not known"));
}
