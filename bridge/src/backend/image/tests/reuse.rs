//! Clusters that become free: none holds another block's data while the file still names it.

use super::crash::Run;
use super::*;
use crate::random::Random;

/// All that frees clusters, at random, and a crash of the process after each: each block holds what was written to it.
#[test]
fn no_block_ever_shows_another_ones_data() {
    const BLOCKS: u64 = 8;
    for (seed, cluster) in (0..).zip([512, 512, 4096, 65536]) {
        block_on(async {
            let run = Run::new(cluster, seed, false).await;
            let mut random = Random::new(seed);
            // Values of a block: its number in the high bits.
            let mut next = 0;
            for step in 0..60 {
                let first = random.below(BLOCKS);
                let count = 1 + random.below(BLOCKS - first);
                match random.below(6) {
                    0 => run.disk.flush().await.unwrap(),
                    1 => run.disk.trim(first * cluster, count * cluster, Flags::NONE).await.unwrap(),
                    2 => {
                        run.disk.write_zeroes(first * cluster, count * cluster, Flags::NO_HOLE).await.unwrap()
                    }
                    _ => {
                        next = next % 15 + 1;
                        let mut data = Vec::new();
                        for block in first..first + count {
                            let value = u8::try_from(block << 4 | next).unwrap();
                            data.extend(vec![value; usize::try_from(cluster).unwrap()]);
                        }
                        run.disk.write(first * cluster, Buffer::copy_of(&data), Flags::NONE).await.unwrap();
                    }
                }
                let bytes = run.reopened().await;
                for block in 0..BLOCKS {
                    let at = usize::try_from(block * cluster).unwrap();
                    let part = &bytes[at..][..usize::try_from(cluster).unwrap()];
                    let own = |byte: &u8| *byte == 0 || u64::from(*byte >> 4) == block;
                    assert!(
                        part.iter().all(own),
                        "step {step}, block {block}, clusters of {cluster}: {:#x}",
                        part[0]
                    );
                }
            }
        });
    }
}
