//! Magic numbers and limits, as the protocol document gives them.

/// The TCP port IANA gave NBD.
pub const DEFAULT_PORT: u16 = 10_809;
/// `NBDMAGIC` in ASCII, the first eight bytes a server sends (section "Newstyle negotiation").
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT` in ASCII: second word of the greeting, first word of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle greeting, `cliserv_magic` (section "Oldstyle negotiation"): no options, one export.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of every option reply (section "Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// `NBD_REQUEST_MAGIC`: first word of a compact, 28-byte request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// `NBD_EXTENDED_REQUEST_MAGIC`: first word of an extended, 32-byte request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// `NBD_SIMPLE_REPLY_MAGIC`: first word of a simple, 16-byte reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_STRUCTURED_REPLY_MAGIC`: first word of a structured, 20-byte reply chunk header.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// `NBD_EXTENDED_REPLY_MAGIC`: first word of an extended, 32-byte reply chunk header.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string the protocol allows, in bytes: names, queries, messages (section "Conventions").
pub const MAX_NAME_BYTES: usize = 4096;
/// Payload every peer should accept, 32 MiB (section "Size constraints").
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// A server should send no more block status descriptors than this in one chunk (`NBD_REPLY_TYPE_BLOCK_STATUS`).
pub const MAX_EXTENTS: usize = 1 << 20;
/// Length of a simple reply, in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of an option header: magic, option, length of the data; in bytes.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of an option reply header: magic, option, reply type, length of the data; in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// `NBD_REPLY_FLAG_DONE`: the chunk is the last of its reply (section "Structured reply flags").
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
