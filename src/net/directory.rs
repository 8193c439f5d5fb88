//! The exports by name, as the handshake asks for them.

use std::sync::Arc;

use bridge::Export;
use nbd_proto::{Directory, ExportInfo};

use super::translate;

/// The exports of a server.
#[derive(Clone)]
pub(super) struct Exports {
    pub(super) list: Arc<[Arc<Export>]>,
    /// Offer `qemu:allocation-depth`.
    pub(super) depth: bool,
}

impl Exports {
    /// The export that a client's name leads to. "" is the export of that name, or else the only one there is.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<Export>> {
        let exact = self.list.iter().find(|export| export.name() == name);
        match &*self.list {
            [only] if name.is_empty() => exact.or(Some(only)),
            _ => exact,
        }
    }
}

impl Directory for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        for export in self.list.iter() {
            each(export.name(), export.description());
        }
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let export = self.get(name)?;
        Some((export.name().to_owned(), translate::export_info(export)))
    }

    fn contexts(&self, _name: &str) -> Vec<String> {
        let depth = self.depth.then_some(translate::ALLOCATION_DEPTH);
        [translate::BASE_ALLOCATION].into_iter().chain(depth).map(str::to_owned).collect()
    }
}
