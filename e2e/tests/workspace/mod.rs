//! The workspace as cargo describes it, for the tests that judge its shape.

use std::path::PathBuf;

use cargo_metadata::{CargoOpt, Metadata, MetadataCommand};

/// Top of the workspace.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace is there")
}

/// What `cargo metadata` says of it and of every crate in the lock file for this platform.
pub(crate) fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .features(CargoOpt::AllFeatures)
        .other_options(["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"].map(String::from))
        .exec()
        .expect("cargo metadata reads the workspace; is Cargo.lock up to date?")
}
