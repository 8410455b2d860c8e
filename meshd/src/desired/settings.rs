//! Settings of the kernel that packets of the mesh need.

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Path below `/proc/sys/net`.
    pub(crate) path: String,
    /// What it should be.
    pub(crate) value: &'static str,
    /// Whether a kernel without it is fine.
    pub(crate) optional: bool,
    /// It outlives our links, so `meshd down` puts the old value back.
    pub(crate) lasting: bool,
}

/// Settings for the device and the pod links that exist, in the order in which they are written.
///
/// Only links of ours are made to forward, so that the host becomes no router between other networks. IPv6 forwards by
/// `force_forwarding` of a link; kernels before 6.17 lack it, there [`legacy_ipv6`] does.
pub(crate) fn settings(device: &str, pod_links: &[String], has_ipv6: bool) -> Vec<Setting> {
    let of_ours = |path, value, optional| Setting { path, value, optional, lasting: false };
    let mut all = vec![
        // Arriving datagrams carry our mark, so that strict reverse path filters look at the table they came by.
        Setting { lasting: true, ..of_ours("ipv4/conf/all/src_valid_mark".into(), "1", false) },
        of_ours(format!("ipv4/conf/{device}/ignore_routes_with_linkdown"), "0", false),
    ];
    if has_ipv6 {
        all.push(of_ours(format!("ipv6/conf/{device}/ignore_routes_with_linkdown"), "0", false));
    }
    for link in std::iter::once(device).chain(pod_links.iter().map(String::as_str)) {
        all.push(of_ours(format!("ipv4/conf/{link}/forwarding"), "1", false));
        if has_ipv6 {
            all.push(of_ours(format!("ipv6/conf/{link}/accept_ra"), "0", false));
            all.push(of_ours(format!("ipv6/conf/{link}/force_forwarding"), "1", true));
        }
    }
    all
}

/// Settings where the kernel forwards IPv6 for all links or none: first every link that learns its default route from
/// router advertisements is told to go on learning, since forwarding would delete that route.
pub(crate) fn legacy_ipv6(learning: &[String]) -> Vec<Setting> {
    let lasting = |path, value| Setting { path, value, optional: false, lasting: true };
    let keep = learning.iter().map(|link| lasting(format!("ipv6/conf/{link}/accept_ra"), "2"));
    keep.chain([lasting("ipv6/conf/all/forwarding".into(), "1")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_of_ours_forward() {
        let all = settings("mesh0", &["mesh0123456789a".into()], true);
        let has = |path: &str| all.iter().any(|setting| setting.path == path && setting.value == "1");
        for link in ["mesh0", "mesh0123456789a"] {
            assert!(has(&format!("ipv4/conf/{link}/forwarding")), "{all:?}");
            assert!(has(&format!("ipv6/conf/{link}/force_forwarding")), "{all:?}");
        }
        assert!(!has("ipv4/ip_forward") && !has("ipv4/conf/all/forwarding") && !has("ipv6/conf/all/forwarding"));
        assert!(settings("mesh0", &[], false).iter().all(|setting| setting.path.starts_with("ipv4/")));
    }

    #[test]
    fn learning_links_come_before_forwarding() {
        let all = legacy_ipv6(&["eth0".into()]);
        let paths: Vec<_> = all.iter().map(|setting| setting.path.as_str()).collect();
        assert_eq!(paths, ["ipv6/conf/eth0/accept_ra", "ipv6/conf/all/forwarding"]);
    }
}
