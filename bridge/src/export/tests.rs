//! What views share, and what they do not.

use super::*;
use crate::backend::memory::MemoryBackend;
use crate::layer::ThrottleConfig;

fn call(export: &Export, operation: Operation, data: Data<'_>) -> Result<()> {
    let len = match &data {
        Data::Into(buf) => buf.len(),
        Data::From(data) => data.len(),
        Data::Piped(data) => data.len,
    };
    let request = Request { operation, offset: 0, len: len as u64, flags: Flags::NONE };
    export.try_execute(&request, data, Instant::now()).expect("memory never declines")
}

#[test]
fn a_read_only_view_shares_all_but_the_right_to_write() {
    let config = "iops-total=1000000".parse::<ThrottleConfig>().unwrap();
    let stack = Throttle::new(Box::new(MemoryBackend::new(4096)), config).unwrap();
    let export = Export::throttled("disk", Some("words".to_owned()), stack, Vec::new());
    let view = export.read_only_view();
    assert_eq!((view.name(), view.description()), ("disk", Some("words")));
    assert!(view.geometry().read_only() && !export.geometry().read_only());
    let refusal = call(&view, Operation::Write, Data::From(&[1; 512])).unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::ReadOnly);
    call(&export, Operation::Write, Data::From(&[7; 512])).unwrap();
    let mut seen = [0; 512];
    call(&view, Operation::Read, Data::Into(&mut seen)).unwrap();
    assert_eq!(seen, [7; 512]);
    let counts = |export: &Export| {
        let [read, write] = [Operation::Read, Operation::Write].map(|which| export.stats().of(which));
        (read.count, write.count, write.errors)
    };
    assert_eq!(counts(&export), (1, 2, 1));
    assert_eq!(counts(&view), (1, 2, 1));
    let sizes = view.watch_size();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(export.resize(8192)).unwrap();
    assert_eq!((*sizes.borrow(), view.geometry().size), (8192, 8192));
    assert_eq!(runtime.block_on(view.resize(16_384)).unwrap_err().kind(), ErrorKind::ReadOnly);
    view.throttle().unwrap().set(ThrottleConfig::default()).unwrap();
    assert_eq!(export.throttle().unwrap().config(), ThrottleConfig::default());
}
