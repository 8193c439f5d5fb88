//! Admission by bytes: one budget for the process, an account for each connection.
//!
//! An account holds at most a quarter of the budget, and has a small part of its own that others cannot take
//! ([`RESERVE_BYTES`]), so that a few greedy connections never stop a modest one. A charge is taken whole or
//! waited for, never in parts: nobody holds some bytes while waiting for more of the same request.
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
    total: u64,
    free: Arc<Semaphore>,
}

impl Budget {
    /// A budget of `total` bytes, at least [`MIN_BUDGET_BYTES`].
    pub fn new(total: u64) -> Arc<Self> {
        let total = total.max(MIN_BUDGET_BYTES);
        let permits = usize::try_from(total).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Arc::new(Budget { total, free: Arc::new(Semaphore::new(permits)) })
    }

    /// Opens an account; None where not even its reserve is free.
    pub fn open_account(self: &Arc<Self>) -> Option<Account> {
        let reserve = self.free.clone().try_acquire_many_owned(ACCOUNT_BYTES).ok()?;
        // A quarter, but always enough for the largest request with its overhead.
        let cap = usize::try_from((self.total / 4).max(MIN_CAP_BYTES)).unwrap_or(usize::MAX);
        let cap = cap.min(Semaphore::MAX_PERMITS);
        Some(Account {
            shared: self.free.clone(),
            own: Arc::new(Semaphore::new(RESERVE_BYTES as usize)),
            cap: Arc::new(Semaphore::new(cap)),
            _reserve: reserve,
        })
    }

    /// Bytes that nobody holds.
    pub fn free_bytes(&self) -> u64 {
        self.free.available_permits() as u64
    }
}

/// One connection's share of the budget.
#[derive(Debug)]
pub struct Account {
    shared: Arc<Semaphore>,
    own: Arc<Semaphore>,
    cap: Arc<Semaphore>,
    _reserve: OwnedSemaphorePermit,
}

/// Bytes taken from a budget; given back when dropped.
#[derive(Debug, Default)]
pub struct Charge {
    _cap: Option<OwnedSemaphorePermit>,
    _bytes: Option<OwnedSemaphorePermit>,
}

impl Account {
    /// Takes `bytes` if they are free now.
    pub fn try_charge(&self, bytes: u32) -> Option<Charge> {
        if bytes == 0 {
            return Some(Charge::default());
        }
        if let Ok(own) = self.own.clone().try_acquire_many_owned(bytes) {
            return Some(Charge { _cap: None, _bytes: Some(own) });
        }
        let cap = self.cap.clone().try_acquire_many_owned(bytes).ok()?;
        let shared = self.shared.clone().try_acquire_many_owned(bytes).ok()?;
        Some(Charge { _cap: Some(cap), _bytes: Some(shared) })
    }

    /// Takes `bytes`, waiting in line where they are not free. Cancel-safe: a dropped wait holds nothing.
    /// More than a quarter of the budget at once is never granted and must not be asked for.
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
        let shared = self.shared.clone().acquire_many_owned(bytes).await.ok();
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
    fn one_account_holds_a_quarter_and_others_still_get_their_reserve() {
        let budget = Budget::new(128 << 20);
        let accounts: Vec<Account> = (0..5).map(|_| budget.open_account().unwrap()).collect();
        let mut held: Vec<Charge> = (0..4).flat_map(|n| accounts[n].try_charge(31 << 20)).collect();
        assert!(accounts[0].try_charge(4 << 20).is_none(), "over its quarter");
        while let Some(charge) = accounts[4].try_charge(1 << 20) {
            held.push(charge);
        }
        // The budget is used up now, but not anybody's reserve.
        assert!(budget.free_bytes() < 1 << 20);
        let small = accounts[4].try_charge(RESERVE_BYTES).unwrap();
        drop(small);
        drop(held);
        drop(accounts);
        assert_eq!(budget.free_bytes(), 128 << 20);
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
        assert_eq!(accounts.len() as u64, MIN_BUDGET_BYTES / u64::from(ACCOUNT_BYTES));
    }
}
