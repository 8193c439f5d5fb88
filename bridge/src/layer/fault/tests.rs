use std::rc::Rc;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::Instant;

use super::*;
use crate::ErrorKind;
use crate::backend::memory::MemoryBackend;

fn paused<T>(future: impl Future<Output = T>) -> T {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(LocalOptions::default())
        .unwrap()
        .block_on(future)
}

fn fault(text: &str) -> Rc<Fault> {
    Rc::new(Fault::new(Box::new(MemoryBackend::new(1 << 20)), text.parse().unwrap()))
}

async fn read(fault: &Fault, offset: u64) -> Result<u8> {
    fault.read(offset, Buffer::new(1), Flags::NONE).await.map(|buf| buf[0])
}

#[test]
fn the_seed_decides_which_requests_fail() {
    paused(async {
        let mut runs = Vec::new();
        for seed in [1, 1, 2] {
            let fault = fault(&format!("seed={seed},error-rate=0.2,errno=ENOSPC,op=read"));
            let mut failed = Vec::new();
            for n in 0..500 {
                match read(&fault, n).await {
                    Ok(_) => {}
                    Err(error) => {
                        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(28)));
                        failed.push(n);
                    }
                }
            }
            assert!((70..130).contains(&failed.len()), "{}", failed.len());
            assert_eq!(fault.handle().injected(), failed.len() as u64);
            runs.push(failed);
        }
        assert!(runs[0] == runs[1] && runs[0] != runs[2]);
    });
}

#[test]
fn only_what_matches_is_touched_and_leaves_the_fast_path() {
    paused(async {
        let fault = fault("error-every=1,op=write,offset=4K,len=4K");
        let tried = |offset, len| fault.try_write(offset, &vec![1; len], Flags::NONE).is_some();
        assert!(tried(0, 4096) && !tried(0, 4097) && !tried(8191, 1) && tried(8192, 1));
        assert!(fault.try_read(4096, &mut [0], Flags::NONE).is_some());
        let write = |offset| fault.write(offset, Buffer::copy_of(&[9]), Flags::NONE);
        assert!(write(0).await.is_ok() && write(5000).await.is_err());
        assert!(fault.flush().await.is_ok() && fault.trim(4096, 1, Flags::NONE).await.is_ok());
        fault.handle().set_enabled(false);
        assert!(write(5000).await.is_ok() && tried(5000, 1));
    });
}

#[test]
fn a_short_write_is_torn() {
    paused(async {
        let fault = fault("short-rate=1,op=write");
        assert!(fault.write(0, Buffer::copy_of(&[7; 100]), Flags::NONE).await.is_err());
        assert_eq!((read(&fault, 49).await.unwrap(), read(&fault, 50).await.unwrap()), (7, 0));
    });
}

#[test]
fn delays_add_up_and_every_nth_is_late() {
    paused(async {
        let late = |ms| Rule::new(Effect::Delay(Duration::from_millis(ms)));
        let rules = vec![late(5).on(Operation::Flush), late(7).when(When::Every(3))];
        let fault = Fault::new(Box::new(MemoryBackend::new(1 << 20)), FaultConfig { seed: 1, rules });
        let mut delays = Vec::new();
        for _ in 0..6 {
            let start = Instant::now();
            fault.flush().await.unwrap();
            delays.push(start.elapsed().as_millis());
        }
        assert_eq!(delays, [5, 5, 12, 5, 5, 12]);
    });
}

#[test]
fn what_hangs_is_done_when_released() {
    paused(async {
        let fault = fault("hang-every=2,op=read");
        let handle = fault.handle();
        let tasks: Vec<_> = (0..10)
            .map(|n| {
                let fault = fault.clone();
                tokio::task::spawn_local(async move { read(&fault, n).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(handle.hanging(), 5);
        assert_eq!(tasks.iter().filter(|task| task.is_finished()).count(), 5);
        handle.release();
        for task in tasks {
            assert!(task.await.unwrap().is_ok());
        }
        assert_eq!(handle.hanging(), 0);
    });
}
