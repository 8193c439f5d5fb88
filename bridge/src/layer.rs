//! Layers: backends that own another backend and change how it behaves.
