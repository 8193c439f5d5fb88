//! What an image, a device or memory is: facts, printed for people or as JSON.

use std::path::Path;

use anyhow::Result;
use bridge::backend::image::{self, Description, ImageMemory};
use bridge::partition::{Partition, Scheme, Table};
use bridge::{Backend, Capabilities, ExtentKind, Flags, partition};
use serde_json::json;

use crate::cli::{InfoArgs, Source};
use crate::os_text::OsText;
use crate::{assemble, output, size};

/// A named fact. The name is JSON's; people see it with blanks.
struct Fact {
    name: &'static str,
    value: Value,
}

/// What a fact says.
enum Value {
    Text(String),
    /// A path, or another source.
    Place(OsText),
    Number(u64),
    /// A number of bytes: people see what they amount to as well.
    Bytes(u64),
    Flag(bool),
    List(Vec<String>),
    /// Images, each with its format behind it.
    Chain(Vec<OsText>),
    Partitions(Table),
}

/// A run of the map.
struct Run {
    start: u64,
    len: u64,
    kind: ExtentKind,
}

/// What there is to print.
pub(super) struct Told {
    pub(super) text: String,
    /// What keeps it from being served, or from being told about in full; the text may say it as well.
    pub(super) failed: Option<Failed>,
}

/// What the text lacks.
pub(super) enum Failed {
    /// It cannot be served, which the text says.
    Told,
    /// The rest of the map, for this reason.
    Map(anyhow::Error),
}

/// Tells about a source.
///
/// # Errors
/// One line: it cannot be read. An image that cannot be served is told about all the same, if its header makes sense.
pub(super) fn tell(args: &InfoArgs) -> Result<Told> {
    let opened = assemble::open(&args.source, &args.source_args(), &ImageMemory::default());
    let mut facts = vec![Fact { name: "source", value: Value::Place(args.source.as_given()) }];
    if let Source::Path(path) = &args.source {
        facts.extend(image_facts(path, args)?);
    }
    match &opened {
        Ok(source) => {
            facts.extend(source_facts(&**source));
            facts.extend(partition_facts(&**source, assemble::sector_of(&args.source, &args.source_args()))?);
        }
        Err(error) if !args.map => facts.push(text("problem", format!("{error:#}"))),
        Err(_) => {}
    }
    let (map, failed) = match opened {
        Ok(source) if args.map => {
            let (runs, error) = map_of(&*source)?;
            let error = error.map(|error| anyhow::Error::from(error).context(args.source.to_string()));
            (Some(runs), error.map(Failed::Map))
        }
        Ok(_) => (None, None),
        Err(error) if args.map => return Err(error),
        Err(_) => (None, Some(Failed::Told)),
    };
    let text = if args.json { json(&facts, map.as_deref()) } else { lines(&facts, map.as_deref()) };
    Ok(Told { text, failed })
}

fn text(name: &'static str, value: impl Into<String>) -> Fact {
    Fact { name, value: Value::Text(value.into()) }
}

fn image_facts(path: &Path, args: &InfoArgs) -> Result<Vec<Fact>> {
    let any = args.allow_backing.any();
    let Description {
        format,
        size,
        allocated,
        length,
        version,
        cluster_size,
        refcount_bits,
        features,
        data_file,
        chain,
    } = image::describe(path, args.format, any)?;
    let mut facts = vec![text("format", format.name())];
    facts.extend(size.map(|size| Fact { name: "header-size", value: Value::Bytes(size) }));
    facts.push(Fact { name: "allocated", value: Value::Bytes(allocated) });
    facts.push(Fact { name: "file-length", value: Value::Bytes(length) });
    facts.extend(version.map(|version| Fact { name: "version", value: Value::Number(version.into()) }));
    facts.extend(cluster_size.map(|size| Fact { name: "cluster-size", value: Value::Bytes(size) }));
    facts.extend(refcount_bits.map(|bits| Fact { name: "refcount-bits", value: Value::Number(bits.into()) }));
    if let Some(mark) = features.iter().find(|feature| ["corrupt", "dirty"].contains(feature)) {
        let path = path.display();
        let warning = format!("is marked {mark}: it can only be read, and what is read may be wrong");
        facts.push(text("warning", format!("{warning}; `qemu-img check -r all {path}` repairs it")));
    }
    if !features.is_empty() {
        facts.push(Fact {
            name: "features",
            value: Value::List(features.into_iter().map(str::to_owned).collect()),
        });
    }
    facts.extend(data_file.map(|path| Fact { name: "data-file", value: Value::Place(path.into()) }));
    if !chain.is_empty() {
        let chain = chain.iter().map(|link| {
            let mut words = link.path.clone().into_os_string();
            words.push(format!(" ({})", link.format));
            OsText::from(words)
        });
        facts.push(Fact { name: "backing-chain", value: Value::Chain(chain.collect()) });
    }
    Ok(facts)
}

fn source_facts(source: &dyn Backend) -> Vec<Fact> {
    let geometry = source.geometry();
    vec![
        Fact { name: "size", value: Value::Bytes(geometry.size) },
        Fact { name: "minimum-block", value: Value::Number(geometry.min_block.into()) },
        Fact { name: "preferred-block", value: Value::Number(geometry.preferred_block.into()) },
        Fact {
            name: "rotational",
            value: Value::Flag(geometry.capabilities.contains(Capabilities::ROTATIONAL)),
        },
    ]
}

/// The partitions; an unsound table is a fact too.
fn partition_facts(source: &dyn Backend, sector: Option<u32>) -> Result<Option<Fact>> {
    Ok(match assemble::apart(|| partition::read(source, sector))? {
        Ok(table) => table.map(|table| Fact { name: "partition-table", value: Value::Partitions(table) }),
        Err(error) => Some(text("partition-table", error.to_string())),
    })
}

fn scheme_name(table: &Table) -> &'static str {
    match table.scheme {
        Scheme::Gpt => "GPT",
        Scheme::Mbr => "MBR",
    }
}

/// Asks for the whole map, piece by piece. If a part of it cannot be told, returns what lies before that part, and the reason.
fn map_of(source: &dyn Backend) -> Result<(Vec<Run>, Option<bridge::Error>)> {
    assemble::apart(|| async {
        let end = source.geometry().size;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 0;
        while at < end {
            let extents = match source.block_status(at, end - at, Flags::NONE).await {
                Ok(extents) => extents,
                Err(error) => return (runs, Some(error)),
            };
            for extent in extents {
                match runs.last_mut() {
                    Some(run) if run.kind == extent.kind => run.len += extent.len,
                    _ => runs.push(Run { start: at, len: extent.len, kind: extent.kind }),
                }
                at += extent.len;
            }
        }
        (runs, None)
    })
}

fn kind_name(kind: ExtentKind) -> &'static str {
    match kind {
        ExtentKind::Data => "data",
        ExtentKind::Zero => "zero",
        ExtentKind::Hole | ExtentKind::HoleNotZero => "hole",
    }
}

fn lines(facts: &[Fact], map: Option<&[Run]>) -> String {
    let mut text = String::new();
    for Fact { name, value } in facts {
        let name = format!("{}:", name.replace('-', " "));
        let mut line = |value: &str| text.push_str(&format!("{name:<17}{}\n", output::plain(value)));
        match value {
            Value::Text(value) => line(value),
            Value::Place(value) => line(&value.to_string()),
            Value::Number(number) => line(&number.to_string()),
            Value::Bytes(bytes) => line(&size::full(*bytes)),
            Value::Flag(set) => line(if *set { "yes" } else { "no" }),
            Value::List(items) => line(&items.join(", ")),
            Value::Chain(items) => {
                line(&items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
            }
            Value::Partitions(table) => {
                line(scheme_name(table));
                if let Some(flaw) = table.flaw {
                    text.push_str(&format!("{:<17}{flaw}\n", "flaw:"));
                }
                for Partition { number, start, len, kind, name } in &table.partitions {
                    let (size, name) = (size::human(*len), output::plain(name));
                    text.push_str(&format!("{number:>16} {size} from byte {start}, type {kind} {name}\n"));
                }
            }
        }
    }
    for Run { start, len, kind } in map.unwrap_or_default() {
        text.push_str(&format!("{start:>16}{len:>16}  {}\n", kind_name(*kind)));
    }
    text
}

fn json(facts: &[Fact], map: Option<&[Run]>) -> String {
    let mut members = serde_json::Map::new();
    for Fact { name, value } in facts {
        let value = match value {
            Value::Text(value) => json!(value),
            Value::Place(value) => json!(value),
            Value::Number(number) | Value::Bytes(number) => json!(number),
            Value::Flag(set) => json!(set),
            Value::List(items) => json!(items),
            Value::Chain(items) => json!(items),
            Value::Partitions(table) => {
                let partitions = table.partitions.iter().map(|found| {
                    json!({ "number": found.number, "start": found.start, "length": found.len,
                            "type": found.kind, "name": found.name })
                });
                let mut told = json!({ "scheme": scheme_name(table), "sector-size": table.sector_bytes,
                                       "partitions": partitions.collect::<Vec<_>>() });
                if !table.extended.is_empty() {
                    told["extended"] = json!(table.extended);
                }
                if let Some(flaw) = table.flaw {
                    told["flaw"] = json!(flaw);
                }
                told
            }
        };
        members.insert((*name).to_owned(), value);
    }
    if let Some(map) = map {
        let runs = map.iter().map(
            |Run { start, len, kind }| json!({ "start": start, "length": len, "kind": kind_name(*kind) }),
        );
        members.insert("map".to_owned(), runs.collect());
    }
    format!("{:#}\n", serde_json::Value::from(members))
}
