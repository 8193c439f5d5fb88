use proptest::prelude::*;

use super::*;
use crate::testing::quick;

const WRITE: [u8; 28] = [
    0x25, 0x60, 0x95, 0x13, // magic
    0x00, 0x01, // FUA
    0x00, 0x01, // write
    1, 2, 3, 4, 5, 6, 7, 8, // cookie
    0, 0, 0, 0, 0, 0, 0x10, 0, // offset
    0, 0, 2, 0, // length
];

const ZEROES: [u8; 32] = [
    0x21, 0xe4, 0x1c, 0x71, // magic
    0x00, 0x12, // NO_HOLE, FAST_ZERO
    0x00, 0x06, // write zeroes
    1, 2, 3, 4, 5, 6, 7, 8, // cookie
    0, 0, 0, 0, 0, 0, 0x10, 0, // offset
    0, 0, 0, 1, 0, 0, 0, 0, // length
];

fn request(flags: u16, command: Command, length: u64) -> Request {
    Request { flags: CommandFlags(flags), command, cookie: 0x0102_0304_0506_0708, offset: 4096, length }
}

#[test]
fn headers_as_the_document_lays_them_out() {
    let write = request(1, Command::Write, 512);
    let zeroes = request(0x12, Command::WriteZeroes, 1 << 32);
    for (bytes, extended, expected) in [(&WRITE[..], false, write), (&ZEROES[..], true, zeroes)] {
        assert_eq!(Request::parse(bytes, extended), Ok(Some(expected)));
        let mut out = Vec::new();
        expected.encode(extended, &mut out);
        assert_eq!(out, bytes);
        for cut in 0..bytes.len() {
            assert_eq!(Request::parse(&bytes[..cut], extended), Ok(None), "cut at {cut}");
        }
    }
}

#[test]
fn a_wrong_magic_is_told_after_four_bytes() {
    let found = BadMagic { found: 0x2560_9513 };
    assert_eq!(Request::parse(&WRITE[..4], true), Err(found));
    assert_eq!(Request::parse(&ZEROES, false), Err(BadMagic { found: 0x21e4_1c71 }));
    assert_eq!(Request::parse(b"GET ", false), Err(BadMagic { found: 0x4745_5420 }));
    assert_eq!(Request::parse(b"GET", false), Ok(None));
}

#[test]
fn payload_is_what_must_be_drained() {
    const PAYLOAD: u16 = 1 << 5;
    let rows = [
        // command, flags, compact, extended
        (Command::Write, 0, 512, 512),
        (Command::Write, PAYLOAD, 512, 512),
        (Command::Read, 0, 0, 0),
        (Command::Read, PAYLOAD, 0, 512),
        (Command::BlockStatus, PAYLOAD, 0, 512),
        (Command::WriteZeroes, 0, 0, 0),
        (Command::Disconnect, 0, 0, 0),
        (Command::Unknown(77), 0, 0, 0),
        (Command::Unknown(77), PAYLOAD, 0, 512),
    ];
    for (command, flags, compact, extended) in rows {
        let request = request(flags, command, 512);
        assert_eq!(request.payload_len(false), compact, "{request:?}");
        assert_eq!(request.payload_len(true), extended, "{request:?}");
    }
}

#[test]
fn flags_apply_to_their_commands_only() {
    use TransmissionFlags as Granted;
    let all = Granted(0xffff);
    let rows = [
        // command, allowed in compact headers, allowed in extended headers
        (Command::Read, 0b00_0101, 0b00_0101),
        (Command::Write, 0b00_0001, 0b10_0001),
        (Command::Disconnect, 0b00_0001, 0b00_0001),
        (Command::Flush, 0b00_0001, 0b00_0001),
        (Command::Trim, 0b00_0001, 0b00_0001),
        (Command::Cache, 0b00_0001, 0b00_0001),
        (Command::WriteZeroes, 0b01_0011, 0b01_0011),
        (Command::BlockStatus, 0b00_1001, 0b10_1001),
    ];
    for (command, compact, extended) in rows {
        for bit in 0..16 {
            let request = request(1 << bit, command, 512);
            assert_eq!(request.check_flags(false, all).is_ok(), compact & (1 << bit) != 0, "{request:?}");
            assert_eq!(request.check_flags(true, all).is_ok(), extended & (1 << bit) != 0, "{request:?}");
        }
    }
    let denied = [
        (Command::Write, CommandFlags::FUA, Granted::SEND_FUA),
        (Command::Read, CommandFlags::DF, Granted::SEND_DF),
        (Command::WriteZeroes, CommandFlags::FAST_ZERO, Granted::SEND_FAST_ZERO),
        (Command::BlockStatus, CommandFlags::PAYLOAD_LEN, Granted::BLOCK_STATUS_PAYLOAD),
    ];
    for (command, flag, without) in denied {
        let request = request(flag.0, command, 512);
        assert_eq!(request.check_flags(true, all.without(without)), Err(NbdError::Inval), "{request:?}");
    }
    for command in [Command::Resize, Command::Unknown(9), Command::Unknown(0xffff)] {
        assert_eq!(request(0, command, 0).check_flags(true, all), Err(NbdError::Inval));
    }
}

proptest! {
    #![proptest_config(quick(0x5eed_0001))]

    #[test]
    fn decode_undoes_encode(
        flags: u16, command: u16, cookie: u64, offset: u64, length: u64, extended: bool, tail: Vec<u8>,
    ) {
        let length = if extended { length } else { length & 0xffff_ffff };
        let command = Command::from_wire(command);
        let request = Request { flags: CommandFlags(flags), command, cookie, offset, length };
        let mut bytes = Vec::new();
        request.encode(extended, &mut bytes);
        prop_assert_eq!(bytes.len(), Request::header_len(extended));
        bytes.extend_from_slice(&tail);
        prop_assert_eq!(Request::parse(&bytes, extended), Ok(Some(request)));
        prop_assert_eq!(Command::from_wire(command.wire()), command);
    }
}
