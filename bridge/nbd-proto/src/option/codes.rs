//! The numbers of options, replies and information types.

macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$variant_doc:meta])* $variant:ident = $number:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// Any other number.
            Unknown($int),
        }

        impl $name {
            /// The meaning of a number on the wire.
            pub const fn from_wire(number: $int) -> Self {
                $(if number == $number { return Self::$variant; })*
                Self::Unknown(number)
            }

            /// The number on the wire.
            pub const fn wire(self) -> $int {
                match self {
                    $(Self::$variant => $number,)*
                    Self::Unknown(number) => number,
                }
            }
        }
    };
}

wire_enum! {
    /// An option (section "Option types").
    OptionCode(u32) {
        /// `NBD_OPT_EXPORT_NAME` (1): choose an export and begin, without a way to refuse but to hang up.
        ExportName = 1,
        /// `NBD_OPT_ABORT` (2): end the session.
        Abort = 2,
        /// `NBD_OPT_LIST` (3): which exports are there.
        List = 3,
        /// `NBD_OPT_STARTTLS` (5): go on over TLS.
        StartTls = 5,
        /// `NBD_OPT_INFO` (6): what would `Go` answer.
        Info = 6,
        /// `NBD_OPT_GO` (7): choose an export and begin.
        Go = 7,
        /// `NBD_OPT_STRUCTURED_REPLY` (8): answer with chunks.
        StructuredReply = 8,
        /// `NBD_OPT_LIST_META_CONTEXT` (9): which metadata contexts are there.
        ListMetaContext = 9,
        /// `NBD_OPT_SET_META_CONTEXT` (10): select metadata contexts.
        SetMetaContext = 10,
        /// `NBD_OPT_EXTENDED_HEADERS` (11): 64-bit lengths.
        ExtendedHeaders = 11,
    }
}

wire_enum! {
    /// A reply to an option (section "Option reply types").
    OptReply(u32) {
        /// `NBD_REP_ACK`: done; no data.
        Ack = 1,
        /// `NBD_REP_SERVER`: length of a name (4 bytes), the name, a description.
        Server = 2,
        /// `NBD_REP_INFO`: information type (2 bytes), and what it demands.
        Info = 3,
        /// `NBD_REP_META_CONTEXT`: context id (4 bytes), name.
        MetaContext = 4,
        /// `NBD_REP_ERR_UNSUP`: the option is unknown.
        ErrUnsup = (1 << 31) + 1,
        /// `NBD_REP_ERR_POLICY`: forbidden by the server's configuration.
        ErrPolicy = (1 << 31) + 2,
        /// `NBD_REP_ERR_INVALID`: malformed, or not now.
        ErrInvalid = (1 << 31) + 3,
        /// `NBD_REP_ERR_PLATFORM`: not on this platform.
        ErrPlatform = (1 << 31) + 4,
        /// `NBD_REP_ERR_TLS_REQD`: not without TLS.
        ErrTlsReqd = (1 << 31) + 5,
        /// `NBD_REP_ERR_UNKNOWN`: no such export.
        ErrUnknown = (1 << 31) + 6,
        /// `NBD_REP_ERR_SHUTDOWN`: the server is going away.
        ErrShutdown = (1 << 31) + 7,
        /// `NBD_REP_ERR_BLOCK_SIZE_REQD`: ask for `NBD_INFO_BLOCK_SIZE` first.
        ErrBlockSizeReqd = (1 << 31) + 8,
        /// `NBD_REP_ERR_TOO_BIG`: too large to process.
        ErrTooBig = (1 << 31) + 9,
        /// `NBD_REP_ERR_EXT_HEADER_REQD`: only with extended headers.
        ErrExtHeaderReqd = (1 << 31) + 10,
    }
}

impl OptReply {
    /// Whether it is an error; true for unknown numbers with bit 31 set, too.
    pub const fn is_error(self) -> bool {
        self.wire() & (1 << 31) != 0
    }
}

wire_enum! {
    /// A kind of information about an export (section "Option reply types", `NBD_REP_INFO`).
    InfoType(u16) {
        /// `NBD_INFO_EXPORT` (0): size and transmission flags; always sent.
        Export = 0,
        /// `NBD_INFO_NAME` (1): the canonical name.
        Name = 1,
        /// `NBD_INFO_DESCRIPTION` (2): text for a human.
        Description = 2,
        /// `NBD_INFO_BLOCK_SIZE` (3): minimum and preferred block, largest payload.
        BlockSize = 3,
    }
}
