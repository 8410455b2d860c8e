//! Typed Linux network calls: namespaces, links, addresses, routes, rules, nftables, sysctls.
