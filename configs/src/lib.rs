//! Every shipped configuration, handed to tests as text.
//!
//! What lies here is what `make install` copies and the README names. Each file is parsed by a test: TOML and JSON here,
//! the units by `systemd-analyze verify`, the daemons' own files by the daemons themselves (`check-config`) in `e2e`.

/// `/etc/mesh/meshd.toml`: every key of `meshd`, commented; a line `#key = value` shows the default.
pub const MESHD_TOML: &str = include_str!("../meshd.toml");

/// `/etc/mesh-keyserver/keyserver.toml`: every key of `keyserver`, in the same manner.
pub const KEYSERVER_TOML: &str = include_str!("../keyserver.toml");

/// `/etc/cni/net.d/10-mesh.conflist`: Mesh as the only CNI plugin, which gives pods their addresses.
///
/// `cniVersion` is 1.0.0 and `cniVersions` lists the others: libcni 1.1 (containerd 1.6 and 1.7) refuses a plain 1.1.0,
/// libcni 1.2 and later picks the newest of the list.
pub const CONFLIST: &str = include_str!("../10-mesh.conflist");

/// The unit of the node daemon.
pub const MESHD_SERVICE: &str = include_str!("../meshd.service");

/// The unit that keeps everything closed until `meshd` runs.
pub const MESH_GUARD_SERVICE: &str = include_str!("../mesh-guard.service");

/// The unit of the keyserver.
pub const KEYSERVER_SERVICE: &str = include_str!("../keyserver.service");

/// `/usr/lib/sysusers.d/mesh.conf`: the group `mesh` and the keyserver's user.
pub const SYSUSERS: &str = include_str!("../mesh.sysusers");

/// All units, by file name.
pub const UNITS: [(&str, &str); 3] = [
    ("keyserver.service", KEYSERVER_SERVICE),
    ("mesh-guard.service", MESH_GUARD_SERVICE),
    ("meshd.service", MESHD_SERVICE),
];

/// A commented TOML file with every shown default taken in: each line `#key = value` without its `#`.
///
/// Prose is told from keys by the space after its `#`.
#[must_use]
pub fn with_defaults_shown(text: &str) -> String {
    let take_in = |line: &str| match line.strip_prefix('#') {
        Some(shown) if shown.starts_with(|first: char| first.is_ascii_lowercase()) => format!("{shown}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(take_in).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_defaults_are_taken_in_and_prose_is_not() {
        let text = "# Says what it is.\n#key = 1\n\n[section]\n#other = \"x\"\nset = 2\n";
        assert_eq!(with_defaults_shown(text), "# Says what it is.\nkey = 1\n\n[section]\nother = \"x\"\nset = 2\n");
    }
}
