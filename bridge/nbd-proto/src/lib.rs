//! Sans-io NBD codec.
