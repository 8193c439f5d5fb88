//! The protocol's bit fields. Bits without a name are kept, so that a value survives decoding and encoding.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Not};

use crate::chunk::ReplyStyle;

macro_rules! bit_field {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$bit_doc:meta])* $bit:ident = $shift:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(
            /// The field as it stands on the wire.
            pub $int,
        );

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self(1 << $shift);)*

            /// No bit set.
            #[inline]
            pub const fn empty() -> Self {
                Self(0)
            }

            /// Every bit this crate has a name for.
            #[inline]
            pub const fn known() -> Self {
                Self(0 $(| 1 << $shift)*)
            }

            /// Whether every bit of `other` is set here.
            #[inline]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether any bit of `other` is set here.
            #[inline]
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// Whether no bit is set.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// These bits without those of `other`.
            #[inline]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;
            #[inline]
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOrAssign for $name {
            #[inline]
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl BitAnd for $name {
            type Output = Self;
            #[inline]
            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl Not for $name {
            type Output = Self;
            #[inline]
            fn not(self) -> Self {
                Self(!self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut names = f.debug_set();
                $(if self.contains(Self::$bit) { names.entry(&format_args!(stringify!($bit))); })*
                let unnamed = self.without(Self::known());
                if !unnamed.is_empty() {
                    names.entry(&format_args!("{:#x}", unnamed.0));
                }
                names.finish()
            }
        }
    };
}

bit_field! {
    /// Handshake flags: what the server's greeting offers (section "Handshake flags").
    HandshakeFlags(u16) {
        /// `NBD_FLAG_FIXED_NEWSTYLE`: the server answers options it does not know.
        FIXED_NEWSTYLE = 0;
        /// `NBD_FLAG_NO_ZEROES`: the server can leave out the padding after `NBD_OPT_EXPORT_NAME`.
        NO_ZEROES = 1;
    }
}

bit_field! {
    /// Client flags: what the client takes from the greeting (section "Client flags").
    ClientFlags(u32) {
        /// `NBD_FLAG_C_FIXED_NEWSTYLE`: the client understands option replies.
        FIXED_NEWSTYLE = 0;
        /// `NBD_FLAG_C_NO_ZEROES`: no 124 zero bytes after `NBD_OPT_EXPORT_NAME`.
        NO_ZEROES = 1;
    }
}

bit_field! {
    /// Transmission flags: what an export can do (section "Transmission flags").
    TransmissionFlags(u16) {
        /// `NBD_FLAG_HAS_FLAGS`: always set.
        HAS_FLAGS = 0;
        /// `NBD_FLAG_READ_ONLY`: writing commands fail.
        READ_ONLY = 1;
        /// `NBD_FLAG_SEND_FLUSH`: `NBD_CMD_FLUSH` is supported.
        SEND_FLUSH = 2;
        /// `NBD_FLAG_SEND_FUA`: `NBD_CMD_FLAG_FUA` is supported.
        SEND_FUA = 3;
        /// `NBD_FLAG_ROTATIONAL`: seeks cost time.
        ROTATIONAL = 4;
        /// `NBD_FLAG_SEND_TRIM`: `NBD_CMD_TRIM` is supported.
        SEND_TRIM = 5;
        /// `NBD_FLAG_SEND_WRITE_ZEROES`: `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE` are supported.
        SEND_WRITE_ZEROES = 6;
        /// `NBD_FLAG_SEND_DF`: `NBD_CMD_FLAG_DF` is supported; only with structured replies.
        SEND_DF = 7;
        /// `NBD_FLAG_CAN_MULTI_CONN`: a flush on one connection covers writes answered on the others.
        CAN_MULTI_CONN = 8;
        /// `NBD_FLAG_SEND_RESIZE`: the experimental `RESIZE` extension.
        SEND_RESIZE = 9;
        /// `NBD_FLAG_SEND_CACHE`: `NBD_CMD_CACHE` is understood.
        SEND_CACHE = 10;
        /// `NBD_FLAG_SEND_FAST_ZERO`: `NBD_CMD_FLAG_FAST_ZERO` is supported.
        SEND_FAST_ZERO = 11;
        /// `NBD_FLAG_BLOCK_STATUS_PAYLOAD`: a block status request may carry a list of contexts; only with
        /// extended headers.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

bit_field! {
    /// Command flags of a request (section "Command flags").
    CommandFlags(u16) {
        /// `NBD_CMD_FLAG_FUA`: answer only once the data is durable; legal on every command.
        FUA = 0;
        /// `NBD_CMD_FLAG_NO_HOLE`: write zeroes must leave the space allocated.
        NO_HOLE = 1;
        /// `NBD_CMD_FLAG_DF`: the read's content must come in one chunk.
        DF = 2;
        /// `NBD_CMD_FLAG_REQ_ONE`: one extent for each context is enough.
        REQ_ONE = 3;
        /// `NBD_CMD_FLAG_FAST_ZERO`: fail with `NBD_ENOTSUP` rather than write zeroes slowly.
        FAST_ZERO = 4;
        /// `NBD_CMD_FLAG_PAYLOAD_LEN`: with extended headers, the length counts payload that follows.
        PAYLOAD_LEN = 5;
    }
}

bit_field! {
    /// Flags of an extent in the `base:allocation` context (section "`base:allocation` metadata context").
    StateFlags(u32) {
        /// `NBD_STATE_HOLE`: not allocated; a write may meet `NBD_ENOSPC`.
        HOLE = 0;
        /// `NBD_STATE_ZERO`: reads as zeroes.
        ZERO = 1;
    }
}

impl TransmissionFlags {
    /// The flags to advertise once `style` is settled.
    ///
    /// `HAS_FLAGS` is always set and `SEND_DF` exactly when replies are chunks. A flag that needs another
    /// one, or extended headers, is cleared without it: clients hang up on such contradictions.
    #[must_use]
    pub fn advertised(self, style: ReplyStyle) -> Self {
        let mut flags = (self | Self::HAS_FLAGS).without(Self::SEND_DF);
        if style != ReplyStyle::Simple {
            flags |= Self::SEND_DF;
        }
        if style != ReplyStyle::Extended {
            flags = flags.without(Self::BLOCK_STATUS_PAYLOAD);
        }
        if !flags.contains(Self::SEND_WRITE_ZEROES) {
            flags = flags.without(Self::SEND_FAST_ZERO);
        }
        flags
    }

    /// What a client may rely on of the flags a server sent: a flag without the one it needs, or one that
    /// `style` rules out, is not kept; and without `HAS_FLAGS` the field means nothing.
    #[must_use]
    pub fn trusted(self, style: ReplyStyle) -> Self {
        if self.contains(Self::HAS_FLAGS) { self & self.advertised(style) } else { Self::empty() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_flags_do_not_contradict_each_other() {
        let all = TransmissionFlags(0xffff);
        assert!(!all.advertised(ReplyStyle::Simple).contains(TransmissionFlags::SEND_DF));
        assert!(!all.advertised(ReplyStyle::Structured).contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
        assert_eq!(all.advertised(ReplyStyle::Extended), all);
        let none = TransmissionFlags::empty();
        assert_eq!(none.advertised(ReplyStyle::Simple), TransmissionFlags::HAS_FLAGS);
        assert_eq!(TransmissionFlags::SEND_FAST_ZERO.advertised(ReplyStyle::Simple).0, 1);
    }

    #[test]
    fn trusted_flags_are_none_that_were_not_sent() {
        let all = TransmissionFlags(0xffff);
        for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
            assert_eq!(all.trusted(style), all.advertised(style));
            assert_eq!(TransmissionFlags::HAS_FLAGS.trusted(style).0, 1);
            assert_eq!(TransmissionFlags(0xfffe).trusted(style).0, 0);
        }
    }

    #[test]
    fn debug_names_the_bits() {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_TRIM | TransmissionFlags(0x8000);
        assert_eq!(format!("{flags:?}"), "{HAS_FLAGS, SEND_TRIM, 0x8000}");
    }
}
