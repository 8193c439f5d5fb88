use super::*;

fn flat(sectors: u64, name: &[u8], sector: u64) -> Extent {
    Extent { sectors, storage: Storage::Flat { name: name.to_owned(), sector } }
}

#[test]
fn descriptors_of_each_product() {
    let esxi = b"# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=fffffffe\nparentCID=ffffffff\n\
        isNativeSnapshot=\"no\"\ncreateType=\"vmfs\"\n\n# Extent description\n\
        RW 83886080 VMFS \"web-flat.vmdk\"\n\n# Change Tracking File\nchangeTrackPath=\"web-ctk.vmdk\"\n\n\
        # The Disk Data Base \n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.thinProvisioned = \"1\"\n\
        ddb.virtualHWVersion = \"14\"\n";
    assert_eq!(parse(esxi), Ok(vec![flat(83_886_080, b"web-flat.vmdk", 0)]));
    let rdm =
        b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"vmfsPassthroughRawDeviceMap\"\n\
        RW 2048 VMFSRDM \"lun-rdmp.vmdk\"\n";
    assert_eq!(parse(rdm), Ok(vec![flat(2048, b"lun-rdmp.vmdk", 0)]));
    let workstation = b"# Disk DescriptorFile\r\nversion=3\r\nencoding=\"windows-1252\"\r\nCID=1\r\n\
        parentCID=ffffffff\r\ncreateType=\"twoGbMaxExtentFlat\"\r\n\r\nRW 4192256 FLAT \"B\xfcro-f001.vmdk\" 0\r\n\
        RW 2048 FLAT \"B\xfcro \"x\"-f002.vmdk\" 128\r\nddb.longContentID = \"a=b\"\r\n";
    assert_eq!(
        parse(workstation),
        Ok(vec![flat(4_192_256, b"B\xfcro-f001.vmdk", 0), flat(2048, b"B\xfcro \"x\"-f002.vmdk", 128)])
    );
    let virtualbox =
        b"# Disk DescriptorFile\nversion=1\nCID=2\nparentCID=ffffffff\ncreateType=\"partitionedDevice\"\n\
        rw 63 flat \"pt.vmdk\" 0\nRW 1000 ZERO\nRDONLY 77 FLAT \"/dev/sda2\" 63\nNOACCESS 5\n\
        # Disk Data Base\nddb.uuid.image=\"7b\"\nddb.uuid.parent=\"00\"\nddb.comment=\"\"\n";
    assert_eq!(
        parse(virtualbox),
        Ok(vec![
            flat(63, b"pt.vmdk", 0),
            Extent { sectors: 1000, storage: Storage::Zero },
            flat(77, b"/dev/sda2", 63),
            Extent { sectors: 5, storage: Storage::NoAccess },
        ])
    );
    let padded =
        [&b"# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"a\" 0\n"[..], &[0; 400], b"RW 1 ZERO"].concat();
    assert_eq!(parse(&padded), Ok(vec![flat(1, b"a", 0)]));
}

#[test]
fn what_is_not_read() {
    for (text, word) in [
        (&b"KDMV\x01\0\0\0"[..], "sparse"),
        (b"COWD", "sparse"),
        (b"# Disk DescriptorFile\nversion=1\n", "without extents"),
        (b"RW 5 SPARSE \"a\"\n", "not supported"),
        (b"RW 5 SESPARSE \"a\"\n", "not supported"),
        (b"RW x FLAT \"a\" 0\n", "no number"),
        (b"RW 5 FLAT a 0\n", "quotes"),
        (b"RW 5 FLAT \"a 0\n", "does not end"),
        (b"RW 5 FLAT \"a\" -1\n", "no number"),
        (b"RW 5 FLAT \"a\" 18446744073709551615\n", "too large"),
        (b"RW 18446744073709551615 ZERO\n", "too large"),
        (b"RW 9000000000000000 ZERO\nRW 9000000000000000 ZERO\nRW 9000000000000000 ZERO\n", "too large"),
        (b"parentCID=12345678\nRW 5 FLAT \"a\" 0\n", "snapshot"),
        (b"parentFileNameHint=\"base.vmdk\"\nRW 5 FLAT \"a\" 0\n", "snapshot"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}
