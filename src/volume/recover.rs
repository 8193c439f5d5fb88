//! Data planes that died together with their supervisors, as the processes of a container or of a service that is killed
//! do. Requests wait for a successor, which whoever serves the pool next starts here.

use std::time::Duration;

use super::plane::{Life, Plane};
use super::{Name, Pool, Result};
use crate::patience::lasts;

/// A supervisor that lives has started a successor by then.
const PATIENCE: Duration = Duration::from_secs(3);

impl Pool {
    /// Starts a successor for each data plane that waits for one. What cannot be done is logged.
    pub(crate) fn recover(&self) {
        for name in self.runtime().names() {
            if let Err(error) = self.recover_one(&name) {
                tracing::warn!("{error}");
            }
        }
    }

    fn recover_one(&self, name: &Name) -> Result<()> {
        if !self.state(name)?.plane.as_ref().is_some_and(stays_dead) {
            return Ok(());
        }
        let volume = self.volume(name)?;
        let mut state = volume.state()?;
        if let Some(plane) = &mut state.plane
            && plane.life() == Life::Recovers
        {
            tracing::warn!("volume `{name}`: its data plane has died; starting another one");
            *plane = plane.recover(name)?;
            volume.tell_limits(plane)?;
            volume.save_state(&state)?;
        }
        Ok(())
    }
}

/// Whether a data plane has died, and nobody starts another one.
fn stays_dead(plane: &Plane) -> bool {
    lasts(PATIENCE, || plane.life() == Life::Recovers)
}
