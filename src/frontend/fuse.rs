//! placeholder
/// x
pub struct FuseMount;
