//! One table of stacks (`support/stacks.rs`), one list of checks: each runs on each. A new backend or layer adds
//! rows there; a new promise adds a check here.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

mod checks;
mod support;

use support::stacks::{ALL, READ_ONLY, STORES, WRITABLE};

/// One test for each check, which runs it on every stack of the kinds that it is about.
macro_rules! conformance {
    ($($theme:ident :: $check:ident on $kinds:ident;)*) => {
        $(
            #[test]
            fn $check() {
                support::on_every_stack($kinds, checks::$theme::$check);
            }
        )*
    };
}

conformance! {
    data::a_new_disk_holds_what_it_should on ALL;
    data::read_after_write on STORES;
    data::zeroes_overwrite_data on STORES;
    data::empty_requests_do_nothing on ALL;
    data::flush_and_fua_change_no_data on STORES;
    data::workers_share_a_disk on STORES;
    zeroes::write_zeroes_with_all_flags on STORES;
    zeroes::fast_zero_is_all_or_nothing on STORES;
    zeroes::the_whole_disk_can_be_zeroed_and_used_again on STORES;
    zeroes::trim_keeps_its_neighbours on STORES;
    status::block_status_agrees_with_the_data on WRITABLE;
    status::block_status_is_told_in_full on ALL;
    limits::past_the_end on ALL;
    limits::a_read_only_disk_refuses_changes on READ_ONLY;
    limits::the_geometry_makes_sense on ALL;
    limits::a_read_or_write_without_its_buffer_fails_alone on ALL;
    size::a_disk_that_can_grow_does on ALL;
    size::a_disk_that_can_shrink_does on ALL;
    size::space_can_be_reserved on ALL;
    paths::both_paths_give_the_same on ALL;
    paths::file_ranges_hold_what_reads_give on ALL;
    paths::every_request_is_counted_once on ALL;
    paths::a_declined_request_has_done_and_counted_nothing on STORES;
}
