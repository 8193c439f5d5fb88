//! Admission by bytes: one budget for the process, an account for each connection.
//!
//! The budget has three parts, so that none can starve another:
//!
//! | part | share | who takes it | waited for |
//! |---|---|---|---|
//! | seats | 3/8 | each open account, once ([`ACCOUNT_BYTES`]) | no: a client too many is refused |
//! | windows | 1/8 | what a connection keeps of input or output between two looks at it | no: it makes do with less |
//! | requests | 1/2 | requests that wait for storage or for the network | yes, in line |
//!
//! An account holds at most a quarter of the whole, and has a small reserve of its own that others cannot take
//! ([`RESERVE_BYTES`]), so that a few greedy connections never stop a modest one. A charge is taken whole or waited
//! for, never in parts: whoever waits for a request's bytes holds none of the same part that depend on it.
//! Counting requests is the door's: it is a matter of one connection.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What every account can charge that nobody else can take, in bytes.
pub const RESERVE_BYTES: u32 = 16 << 10;

/// What an open account takes from the budget: its reserve, and as much each for input and for output that a
/// door keeps for it without a charge.
pub const ACCOUNT_BYTES: u32 = 3 * RESERVE_BYTES;

/// The smallest budget: a quarter of it must hold the largest request, 32 MiB.
pub const MIN_BUDGET_BYTES: u64 = 128 << 20;

/// What one account may hold at least: the largest request and what comes on top of it.
const MIN_CAP_BYTES: u64 = 34 << 20;

/// The bytes that all connections together may hold.
#[derive(Debug)]
pub struct Budget {
    cap: usize,
    seats: Arc<Semaphore>,
    windows: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

impl Budget {
    /// A budget of `total` bytes, at least [`MIN_BUDGET_BYTES`].
    pub fn new(total: u64) -> Arc<Self> {
        let total = total.max(MIN_BUDGET_BYTES);
        let part = |bytes| Arc::new(Semaphore::new(permits(bytes)));
        Arc::new(Budget {
            // A quarter, but always enough for the largest request with its overhead.
            cap: permits((total / 4).max(MIN_CAP_BYTES)),
            seats: part(total / 8 * 3),
            windows: part(total / 8),
            requests: part(total / 2),
        })
    }

    /// Opens an account; None where the seats are taken.
    pub fn open_account(self: &Arc<Self>) -> Option<Account> {
        let seat = self.seats.clone().try_acquire_many_owned(ACCOUNT_BYTES).ok()?;
        Some(Account {
            budget: self.clone(),
            own: Arc::new(Semaphore::new(RESERVE_BYTES as usize)),
            cap: Arc::new(Semaphore::new(self.cap)),
            _seat: seat,
        })
    }

    /// Bytes that nobody holds.
    pub fn free_bytes(&self) -> u64 {
        [&self.seats, &self.windows, &self.requests].map(|part| part.available_permits() as u64).iter().sum()
    }
}

fn permits(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

/// One connection's share of the budget.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    own: Arc<Semaphore>,
    cap: Arc<Semaphore>,
    _seat: OwnedSemaphorePermit,
}

/// Bytes taken from a budget; given back when dropped.
#[derive(Debug, Default)]
pub struct Charge {
    _cap: Option<OwnedSemaphorePermit>,
    _bytes: Option<OwnedSemaphorePermit>,
}

impl Account {
    /// Takes `bytes` for input or output that is kept between two looks at the connection, if they are free now.
    pub fn try_window(&self, bytes: u32) -> Option<Charge> {
        let window = self.budget.windows.clone().try_acquire_many_owned(bytes).ok()?;
        Some(Charge { _cap: None, _bytes: Some(window) })
    }

    /// Takes `bytes` for a request if they are free now.
    pub fn try_charge(&self, bytes: u32) -> Option<Charge> {
        if bytes == 0 {
            return Some(Charge::default());
        }
        if let Ok(own) = self.own.clone().try_acquire_many_owned(bytes) {
            return Some(Charge { _cap: None, _bytes: Some(own) });
        }
        let cap = self.cap.clone().try_acquire_many_owned(bytes).ok()?;
        let shared = self.budget.requests.clone().try_acquire_many_owned(bytes).ok()?;
        Some(Charge { _cap: Some(cap), _bytes: Some(shared) })
    }

    /// Takes `bytes` for a request, waiting in line where they are not free. Cancel-safe: a dropped wait holds
    /// nothing. More than a quarter of the budget at once is never granted and must not be asked for.
    pub async fn charge(&self, bytes: u32) -> Charge {
        if let Some(charge) = self.try_charge(bytes) {
            return charge;
        }
        if bytes <= RESERVE_BYTES {
            // Either source will do; the reserve comes back with the connection's own next answer.
            tokio::select! {
                own = self.own.clone().acquire_many_owned(bytes) => Charge { _cap: None, _bytes: own.ok() },
                charge = self.charge_shared(bytes) => charge,
            }
        } else {
            self.charge_shared(bytes).await
        }
    }

    async fn charge_shared(&self, bytes: u32) -> Charge {
        // The semaphores are never closed, so that `ok` loses nothing.
        let cap = self.cap.clone().acquire_many_owned(bytes).await.ok();
        let shared = self.budget.requests.clone().acquire_many_owned(bytes).await.ok();
        Charge { _cap: cap, _bytes: shared }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn one_account_holds_a_quarter_and_others_still_get_theirs() {
        let budget = Budget::new(256 << 20);
        let accounts: Vec<Account> = (0..4).map(|_| budget.open_account().unwrap()).collect();
        let mut held: Vec<Charge> = (0..2).flat_map(|n| accounts[n].try_charge(63 << 20)).collect();
        assert!(accounts[0].try_charge(2 << 20).is_none(), "over its quarter");
        while let Some(charge) = accounts[2].try_charge(1 << 20) {
            held.push(charge);
        }
        // No request's bytes are left; but reserves, windows and seats are.
        let small = accounts[3].try_charge(RESERVE_BYTES).unwrap();
        assert!(accounts[3].try_charge(RESERVE_BYTES).is_none());
        let window = accounts[3].try_window(256 << 10).unwrap();
        let newcomer = budget.open_account().unwrap();
        drop((small, window, newcomer, held, accounts));
        assert_eq!(budget.free_bytes(), 256 << 20);
    }

    #[test]
    fn windows_are_not_waited_for_and_do_not_stop_requests() {
        let budget = Budget::new(0);
        let account = budget.open_account().unwrap();
        let mut windows = Vec::new();
        while let Some(window) = account.try_window(256 << 10) {
            windows.push(window);
        }
        assert_eq!(windows.len() as u64, MIN_BUDGET_BYTES / 8 / (256 << 10));
        assert!(account.try_charge(32 << 20).is_some());
    }

    #[test]
    fn a_wait_ends_when_bytes_come_back_and_holds_nothing_when_dropped() {
        block_on(async {
            let budget = Budget::new(128 << 20);
            let account = budget.open_account().unwrap();
            let big = account.charge(32 << 20).await;
            let waiting = account.charge(32 << 20);
            tokio::pin!(waiting);
            let brief = std::time::Duration::from_millis(5);
            assert!(tokio::time::timeout(brief, waiting.as_mut()).await.is_err());
            drop(big);
            let second = waiting.await;
            assert!(tokio::time::timeout(brief, account.charge(32 << 20)).await.is_err());
            drop(second);
            let _third = account.charge(32 << 20).await;
        });
    }

    #[test]
    fn accounts_end_where_the_budget_ends() {
        let budget = Budget::new(0);
        let mut accounts = Vec::new();
        while let Some(account) = budget.open_account() {
            accounts.push(account);
            assert!(accounts.len() < 100_000);
        }
        assert_eq!(accounts.len() as u64, MIN_BUDGET_BYTES / 8 * 3 / u64::from(ACCOUNT_BYTES));
        // Those that are seated can still do the largest request.
        assert!(accounts[0].try_charge(32 << 20).is_some());
    }
}
