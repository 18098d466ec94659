//! Front ends: a disk of the store as a device somebody else can open.
