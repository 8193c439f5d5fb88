use super::*;

fn valid() -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    bytes[..4].copy_from_slice(&MAGIC);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(4, &3_u32.to_be_bytes());
    put(8, &200_u64.to_be_bytes());
    put(16, &5_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 30).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(3_u64 << 16).to_be_bytes());
    put(48, &(1_u64 << 16).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
    put(108, &3_u32.to_be_bytes());
    put(112, b"raw");
    put(200, b"b.img");
    bytes
}

#[test]
fn a_header_is_read() {
    let header = parse(&valid()).unwrap();
    assert_eq!((header.size, header.cluster_size(), header.l1_entries), (1 << 30, 65536, 2));
    assert_eq!(header.backing.as_deref(), Some("b.img".as_ref()));
    assert!(header.odd_names.is_empty());
    assert_eq!(header.backing_format.as_deref(), Some("raw"));
    assert_eq!(header.refusal(Path::new("x"), false), None);
}

#[test]
fn names_need_not_be_utf_8() {
    let mut bytes = valid();
    bytes[202] = 0xff;
    let header = parse(&bytes).unwrap();
    assert_eq!(header.backing, Some(OsString::from_vec(b"b.\xffmg".to_vec())));
    assert_eq!(header.odd_names, [(200..205, b"b.\xffmg".to_vec())]);
    bytes[202] = 0;
    parse(&bytes).unwrap_err();
}

#[test]
fn absurd_values_are_refused() {
    for (at, value) in [
        (4, 7_u32),
        (16, 0),
        (16, 5000),
        (20, 8),
        (20, 22),
        (20, u32::MAX),
        (24, u32::MAX),
        (36, 0),
        (36, u32::MAX),
        (40, u32::MAX),
        (44, 512),
        (56, 0),
        (56, u32::MAX),
        (96, 7),
        (100, 103),
        (100, u32::MAX),
        (108, u32::MAX),
        (8, u32::MAX),
    ] {
        let mut bytes = valid();
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        let error = parse(&bytes).unwrap_err();
        assert!(!error.contains('\n') && !error.is_empty(), "{error}");
    }
    for len in 0..300 {
        assert!(parse(&valid()[..len]).is_err() || len >= 205);
    }
}

#[test]
fn refusals_name_the_feature_and_the_way_out() {
    for (bit, word, way_out) in [
        (DIRTY, "dirty", "check -r all"),
        (CORRUPT, "corrupt", "check -r all"),
        (COMPRESSION, "zstd", "convert"),
        (EXTENDED_L2, "extended L2", "convert"),
        (1 << 40, "0x10000000000", "convert"),
    ] {
        let header = Header { incompatible: bit, ..Header::default() };
        let line = header.refusal(Path::new("disk.qcow2"), false).unwrap();
        assert!(line.contains(word) && line.contains(way_out), "{line}");
    }
    let header = Header { crypt: 2, ..Header::default() };
    assert!(header.refusal(Path::new("x"), false).unwrap().contains("encrypted"));
}
