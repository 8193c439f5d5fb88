//! The exports by name, as the handshake asks for them.

use std::sync::Arc;

use bridge::Export;
use nbd_proto::{Directory, ExportInfo};

use super::translate;

/// The exports of a server.
#[derive(Clone)]
pub(super) struct Exports(pub(super) Arc<[Arc<Export>]>);

impl Exports {
    /// The export that a client's name leads to. "" is the export of that name, or else the only one there is.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<Export>> {
        let exact = self.0.iter().find(|export| export.name() == name);
        match &*self.0 {
            [only] if name.is_empty() => exact.or(Some(only)),
            _ => exact,
        }
    }
}

impl Directory for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        for export in self.0.iter() {
            each(export.name(), export.description());
        }
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let export = self.get(name)?;
        Some((export.name().to_owned(), translate::export_info(export)))
    }

    fn contexts(&self, _name: &str) -> Vec<String> {
        vec![translate::BASE_ALLOCATION.to_owned()]
    }
}
