//! Target architectures, one file each.
