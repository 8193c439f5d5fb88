//! Decoding what a server tells in reply to an option: `NBD_REP_INFO`, `NBD_REP_SERVER`, `NBD_REP_META_CONTEXT`.

use super::ClientError;
use crate::chunk::ReplyStyle;
use crate::consts::MAX_PAYLOAD_BYTES;
use crate::export::{ExportInfo, MetaContext};
use crate::flags::TransmissionFlags;
use crate::option::{InfoType, OptionCode};
use crate::wire::{Reader, parse_string};

/// What the replies to one `NBD_OPT_GO` or `NBD_OPT_INFO` told so far. Where something is told twice, the last
/// one counts.
#[derive(Default)]
pub(super) struct Told {
    size_and_flags: Option<(u64, TransmissionFlags)>,
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    /// Minimum, preferred, largest payload.
    blocks: Option<[u32; 3]>,
}

impl Told {
    /// Takes one `NBD_REP_INFO`; `None` if it is malformed. Kinds that are not known are ignored, as they must be.
    pub(super) fn take(&mut self, data: &[u8]) -> Option<()> {
        let mut reader = Reader::new(data);
        match InfoType::from_wire(reader.u16()?) {
            InfoType::Export => return self.take_export(reader.rest()),
            InfoType::Name => self.name = Some(parse_string(reader.rest())?.to_owned()),
            InfoType::Description => self.description = Some(parse_string(reader.rest())?.to_owned()),
            InfoType::BlockSize => {
                self.blocks = Some([reader.u32()?, reader.u32()?, reader.u32()?]);
                return reader.rest().is_empty().then_some(());
            }
            InfoType::Unknown(_) => {}
        }
        Some(())
    }

    /// Takes a size and transmission flags: the whole answer to `NBD_OPT_EXPORT_NAME`.
    pub(super) fn take_export(&mut self, data: &[u8]) -> Option<()> {
        let mut reader = Reader::new(data);
        self.size_and_flags = Some((reader.u64()?, TransmissionFlags(reader.u16()?)));
        reader.rest().is_empty().then_some(())
    }

    pub(super) fn tells_block_sizes(&self) -> bool {
        self.blocks.is_some()
    }

    /// The export as `option` told it, with the block sizes the document assumes where none are told.
    pub(super) fn info(&self, style: ReplyStyle, option: OptionCode) -> Result<ExportInfo, ClientError> {
        let what = "it does not tell the export's size";
        let (size, flags) = self.size_and_flags.ok_or(ClientError::Malformed { option, what })?;
        let [min_block, preferred_block, max_payload] = self.blocks.unwrap_or([1, 4096, MAX_PAYLOAD_BYTES]);
        // Offsets must survive being signed: nothing below a client takes more.
        let sane = i64::try_from(size).is_ok()
            && min_block.is_power_of_two()
            && min_block <= 1 << 16
            && size.is_multiple_of(u64::from(min_block))
            && preferred_block.is_power_of_two()
            && preferred_block >= min_block
            && max_payload >= min_block;
        if !sane {
            return Err(ClientError::BadSizes { size, min_block, preferred_block, max_payload });
        }
        Ok(ExportInfo {
            size,
            flags: flags.trusted(style),
            description: self.description.clone(),
            min_block,
            preferred_block,
            // 2^32 - 1 means no limit, and no aligned request reaches it.
            max_payload: max_payload - max_payload % min_block,
        })
    }
}

/// `NBD_REP_SERVER`: a name and, if there is one, a description.
pub(super) fn server(data: &[u8]) -> Option<(&str, Option<&str>)> {
    let mut reader = Reader::new(data);
    let length = reader.u32()?;
    let name = parse_string(reader.bytes(length)?)?;
    let description = parse_string(reader.rest())?;
    Some((name, (!description.is_empty()).then_some(description)))
}

/// `NBD_REP_META_CONTEXT`.
pub(super) fn context(data: &[u8]) -> Option<MetaContext> {
    let mut reader = Reader::new(data);
    let id = reader.u32()?;
    let name = parse_string(reader.rest())?;
    (!name.is_empty()).then(|| MetaContext { id, name: name.to_owned() })
}
