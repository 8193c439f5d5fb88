use proptest::prelude::*;

use super::*;
use crate::testing::quick;

fn tcp(host: &str, port: u16, export: &str) -> Uri {
    Uri { address: Address::Tcp { host: host.to_owned(), port }, export: export.to_owned() }
}

fn unix(socket: &[u8], export: &str) -> Uri {
    Uri::unix(Path::new(&OsString::from_vec(socket.to_vec())), export)
}

#[test]
fn written_and_read_back() {
    for (address, name, text) in [
        ("127.0.0.1:10809", "", "nbd://127.0.0.1/"),
        ("127.0.0.1:10810", "", "nbd://127.0.0.1:10810/"),
        ("0.0.0.0:1", "disk one", "nbd://0.0.0.0:1/disk%20one"),
        ("[::1]:10809", "a/b", "nbd://[::1]/a/b"),
        ("[fe80::1%3]:9", "/x", "nbd://[fe80::1%253]:9/%2Fx"),
        ("1.2.3.4:5", "ä?#&=%+", "nbd://1.2.3.4:5/%C3%A4%3F%23%26%3D%25%2B"),
    ] {
        let uri = Uri::tcp(address.parse().unwrap(), name);
        assert_eq!(uri.to_string(), text);
        assert_eq!(text.parse(), Ok(uri));
    }
    for (socket, name, text) in [
        (&b"/run/nbd.sock"[..], "", "nbd+unix:///?socket=/run/nbd.sock"),
        (b"/tmp/a b&c", "d", "nbd+unix:///d?socket=/tmp/a%20b%26c"),
        (b"/tmp/\xff+", "//", "nbd+unix:///%2F%2F?socket=/tmp/%FF%2B"),
        (b"\0/abstract", "", "nbd+unix:///?socket=@/abstract"),
    ] {
        let uri = unix(socket, name);
        assert_eq!(uri.to_string(), text);
        assert_eq!(text.parse(), Ok(uri));
    }
}

#[test]
fn what_others_write() {
    for (text, uri) in [
        // The document's own table.
        ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
        ("nbd+unix:///disk?socket=sock", unix(b"sock", "disk")),
        ("nbd://example.com/", tcp("example.com", 10809, "")),
        ("nbd://example.com", tcp("example.com", 10809, "")),
        ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
        ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
        // And more.
        ("NBD://h:1", tcp("h", 1, "")),
        ("nbd://h:/x", tcp("h", 10809, "x")),
        ("nbd:///x", tcp("localhost", 10809, "x")),
        ("nbd://[::1]:65535/x?", tcp("::1", 65535, "x")),
        ("nbd://h/a b+ä%c3%A4", tcp("h", 10809, "a b+ää")),
        ("nbd+unix://?socket=/s", unix(b"/s", "")),
        ("nbd+unix:///?socket=@s", unix(b"\0s", "")),
        ("nbd+unix:///?socket=%40s", unix(b"@s", "")),
        ("nbd+unix:///?socket=./@s", unix(b"./@s", "")),
        ("nbd://[fe80::1%eth0]/", tcp("fe80::1%eth0", 10809, "")),
        ("nbd://[fe80::1%25eth0]:1/x", tcp("fe80::1%eth0", 1, "x")),
        ("nbd://[fe80::1%25]", tcp("fe80::1%25", 10809, "")),
        ("nbd://[fe80::1%2510]", tcp("fe80::1%10", 10809, "")),
        // QEMU's older spelling.
        ("nbd:localhost:10810", tcp("localhost", 10810, "")),
        ("nbd:[::1]:1:exportname=a:b%20", tcp("::1", 1, "a:b%20")),
        ("nbd:unix:/run/a:b c", unix(b"/run/a:b c", "")),
        ("nbd:unix:s:exportname=x", unix(b"s", "x")),
        ("nbd+unix:///a/b?&socket=/x?y=z&", unix(b"/x?y=z", "a/b")),
    ] {
        assert_eq!(text.parse(), Ok(uri), "{text}");
    }
}

#[test]
fn refused() {
    let tls = |what: &str| UriError::Tls(what.to_owned());
    let authority = |what: &str| UriError::Authority(what.to_owned());
    let escape = |what: &str| UriError::Escape(what.to_owned());
    for (text, error) in [
        ("", UriError::Scheme),
        ("disk.img", UriError::Scheme),
        ("nbd:", UriError::Legacy(String::new())),
        ("nbd:disk.img", UriError::Legacy("disk.img".to_owned())),
        ("nbd:h:", UriError::Legacy("h:".to_owned())),
        ("nbd:[::1]", UriError::Legacy("[::1]".to_owned())),
        ("nbd:h:x", authority("h:x")),
        ("nbd:unix:", UriError::BadSocket),
        ("nbd:h:1:exportname=\0", UriError::Name),
        ("http://h/", UriError::Scheme),
        ("nbd+ssh://h/", UriError::Scheme),
        ("nbds://h/", tls("nbds://")),
        ("nbds+unix:///?socket=s", tls("nbds+unix://")),
        ("nbd://me@h/", tls("a user name (me@)")),
        ("nbd://h/?tls-type=psk", tls("tls-type")),
        ("nbd://h:x/", authority("h:x")),
        ("nbd://h:+1/", authority("h:+1")),
        ("nbd://h:0/", authority("h:0")),
        ("nbd://h:65536/", authority("h:65536")),
        ("nbd://::1/", authority("::1")),
        ("nbd://[::1/", authority("[::1")),
        ("nbd://[::1]1/", authority("[::1]1")),
        ("nbd://[h]/", authority("[h]")),
        ("nbd://[pe80::=%253]:9/", authority("[pe80::=%253]:9")),
        ("nbd://[::1%25%ff]/", authority("[::1%25%ff]")),
        ("nbd://[::1%]/", authority("[::1%]")),
        ("nbd://a%3Ab/", authority("a%3Ab")),
        ("nbd://a%00b/", authority("a%00b")),
        ("nbd://a%ff/", authority("a%ff")),
        ("nbd://h/%", escape("%")),
        ("nbd://h/a%2", escape("a%2")),
        ("nbd://h/%+1", escape("%+1")),
        ("nbd://h/%é", escape("%é")),
        ("nbd://h/%00", UriError::Name),
        ("nbd://h/%ff", UriError::Name),
        ("nbd://h/x#y", UriError::Fragment),
        ("nbd://h/?socket=/s", UriError::Parameter("socket".to_owned())),
        ("nbd://h/?x-y", UriError::Parameter("x-y".to_owned())),
        ("nbd+unix:///?socket=/s&sockets=1", UriError::Parameter("sockets".to_owned())),
        ("nbd+unix:///?socket=/s&socket=/t", UriError::Twice("socket".to_owned())),
        ("nbd+unix:///", UriError::NoSocket),
        ("nbd+unix:///?socket=", UriError::BadSocket),
        ("nbd+unix:///?socket=%00", UriError::BadSocket),
        ("nbd+unix:///?socket=a%00", UriError::BadSocket),
        ("nbd+unix://run/nbd.sock?socket=x", UriError::HostOfSocket),
    ] {
        let refusal = text.parse::<Uri>().unwrap_err();
        assert_eq!(refusal, error, "{text}");
        assert!(!refusal.to_string().contains('\n'));
    }
    let long = format!("nbd://h/{}", "x".repeat(4097));
    assert_eq!(long.parse::<Uri>(), Err(UriError::Name));
    assert!(long[..long.len() - 1].parse::<Uri>().is_ok());
}

#[test]
fn what_means_to_be_one() {
    for text in
        ["nbd:h:1", "nbd:unix:s", "nbd://", "NBD+unix:///", "nbds://h", "nbd+vsock://1", "nbds+unix://"]
    {
        assert!(Uri::is_meant(text), "{text}");
    }
    for text in ["nbdx://h", "nbd:disk.img", "./nbd:h:1", "./nbd://h", "file:nbd", "http://h"] {
        assert!(!Uri::is_meant(text), "{text}");
    }
}

proptest! {
    #![proptest_config(quick(0x5eed_0010))]

    #[test]
    fn survives_writing_and_reading(
        export in "[^\0]{0,40}",
        socket in prop::collection::vec(1..=255_u8, 1..40),
        port in 1..=u16::MAX,
        v4: [u8; 4],
        v6: [u8; 16],
    ) {
        let v4 = Uri::tcp((v4, port).into(), &export);
        prop_assert_eq!(v4.to_string().parse(), Ok(v4));
        let v6 = Uri::tcp((v6, port).into(), &export);
        prop_assert_eq!(v6.to_string().parse(), Ok(v6));
        let unix = unix(&socket, &export);
        prop_assert_eq!(unix.to_string().parse(), Ok(unix));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(nbd|nbd\\+unix)://[\\[a:%0-9@\\]]{0,8}[/?]?.{0,20}") {
        if let Ok(uri) = text.parse::<Uri>() {
            prop_assert_eq!(uri.to_string().parse(), Ok(uri));
        }
    }
}
