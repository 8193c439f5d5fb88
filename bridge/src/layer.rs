//! Layers: backends that own another backend and change how it behaves.
//!
//! Each states its capability rule: what of the inner backend's geometry it keeps, gains and loses. There is no
//! shared pass-through with defaults on purpose: a new operation has to be considered by every layer.

pub mod detect_zeroes;
pub mod fault;
pub mod overlay;
pub mod readonly;
mod settings;
pub mod slice;
pub mod throttle;

pub use detect_zeroes::{DetectZeroes, ZeroMode};
pub use fault::{Fault, FaultConfig, FaultHandle};
pub use overlay::Overlay;
pub use readonly::ReadOnly;
pub use settings::SettingError;
pub use slice::Slice;
pub use throttle::{Throttle, ThrottleConfig, ThrottleHandle};
