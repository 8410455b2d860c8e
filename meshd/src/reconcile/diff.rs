//! Lists the steps from what is to what should be, in an order that never opens a gap:
//!
//! 1. the filter, judging old and new prefixes alike; 2. what refuses; 3. rules; 4. device; 5. routes through it;
//!
//! then, backwards: 6. routes; 7. addresses; 8. rules; 9. what refuses; 10. the filter without the old prefixes.

use std::collections::BTreeSet;

use ipnet::IpNet;
use mesh_hostnet::rule::{IpFamily, Rule};

use super::{Action, Actual};
use crate::desired::{FilterState, HostState, Names, RouteState};

/// The steps from `actual` to `desired`. Routes out of pod links are never removed here: `mesh-cni` may have made them a
/// moment ago, and the kernel removes them with the link.
pub(crate) fn diff(desired: &HostState, actual: &Actual) -> Vec<Action> {
    let mut actions = Vec::new();
    let (first, last) = filters(&desired.filter, actual.filter.as_ref());
    actions.extend(first.map(Action::PutFilter));

    let (refusing, leading): (Vec<_>, Vec<_>) =
        desired.routes.iter().filter(|route| !actual.routes.contains(route)).partition(|route| route.link.is_none());
    actions.extend(refusing.into_iter().cloned().map(Action::PutRoute));

    let rules = rules(&desired.names, desired.has_ipv6);
    actions.extend(rules.iter().filter(|rule| !actual.rules.contains(rule)).cloned().map(Action::AddRule));

    let addresses: BTreeSet<IpNet> = desired.device.addresses.iter().map(|ip| IpNet::from(*ip)).collect();
    if let Some(device) = &actual.device {
        if device.mtu != u32::from(desired.device.mtu) {
            actions.push(Action::SetMtu(desired.device.mtu));
        }
        if !device.up {
            actions.push(Action::SetUp);
        }
        actions.extend(addresses.difference(&device.addresses).copied().map(Action::AddAddress));
        actions.extend(leading.into_iter().cloned().map(Action::PutRoute));
    }

    let kept: BTreeSet<_> = desired.routes.iter().map(key).collect();
    let stale = actual.routes.iter().filter(|route| !kept.contains(&key(route)));
    let (refusing, leading): (Vec<_>, Vec<_>) = stale.partition(|route| route.link.is_none());
    let of_a_pod = |route: &&&RouteState| route.link.as_ref().is_some_and(|link| actual.pod_links.contains(link));
    actions.extend(leading.iter().filter(|route| !of_a_pod(route)).map(|route| Action::RemoveRoute((*route).clone())));
    if let Some(device) = &actual.device {
        actions.extend(device.addresses.difference(&addresses).copied().map(Action::RemoveAddress));
    }
    actions.extend(actual.rules.iter().filter(|rule| !rules.contains(rule)).cloned().map(Action::RemoveRule));
    actions.extend(refusing.into_iter().cloned().map(Action::RemoveRoute));
    actions.extend(last.map(Action::PutFilter));
    actions
}

/// Only the steps that close: filter, what refuses, rules. For the guard, before there is a device.
pub(crate) fn closing(desired: &HostState, actual: &Actual) -> Vec<Action> {
    let opens = |action: &Action| {
        matches!(
            action,
            Action::RemoveRoute(_)
                | Action::RemoveRule(_)
                | Action::RemoveAddress(_)
                | Action::PutRoute(RouteState { link: Some(_), .. })
        )
    };
    let mut actions = diff(desired, &Actual { device: None, ..actual.clone() });
    actions.retain(|action| !opens(action));
    actions
}

/// The ip rules that lead to our table, for packets without our mark.
pub(crate) fn rules(names: &Names, has_ipv6: bool) -> Vec<Rule> {
    let families = [Some(IpFamily::V4), has_ipv6.then_some(IpFamily::V6)];
    let rule = |family| Rule {
        protocol: names.route_protocol,
        ..Rule::lookup(family, names.rule_preference, names.table).unless_marked(names.mark, names.mark_mask)
    };
    families.into_iter().flatten().map(rule).collect()
}

/// What a route replaces.
fn key(route: &RouteState) -> (IpNet, u32) {
    (route.prefix, route.metric)
}

/// The filter to begin with and the one to end with. In between, old and new prefixes are judged.
fn filters(desired: &FilterState, actual: Option<&FilterState>) -> (Option<FilterState>, Option<FilterState>) {
    let Some(actual) = actual else { return (Some(desired.clone()), None) };
    if actual == desired {
        return (None, None);
    }
    let mut both = desired.clone();
    both.remote.extend(actual.remote.iter().copied());
    both.remote.sort_unstable();
    both.remote.dedup();
    if both == *desired { (Some(both), None) } else { (Some(both), Some(desired.clone())) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;
    use crate::desired::host_state;
    use crate::desired::tests::facts;
    use crate::reconcile::ActualDevice;

    /// What the kernel would hold after each action.
    fn step(actual: &mut Actual, action: &Action) {
        match action {
            Action::PutFilter(filter) => actual.filter = Some(filter.clone()),
            Action::PutRoute(route) => {
                actual.routes.retain(|other| key(other) != key(route));
                actual.routes.push(route.clone());
            }
            Action::RemoveRoute(route) => actual.routes.retain(|other| other != route),
            Action::AddRule(rule) => actual.rules.push(rule.clone()),
            Action::RemoveRule(rule) => actual.rules.retain(|other| other != rule),
            Action::SetMtu(mtu) => actual.device.as_mut().unwrap().mtu = (*mtu).into(),
            Action::SetUp => actual.device.as_mut().unwrap().up = true,
            Action::AddAddress(net) => assert!(actual.device.as_mut().unwrap().addresses.insert(*net)),
            Action::RemoveAddress(net) => assert!(actual.device.as_mut().unwrap().addresses.remove(net)),
        }
    }

    fn refused(actual: &Actual) -> BTreeSet<IpNet> {
        actual.routes.iter().filter(|route| route.link.is_none()).map(|route| route.prefix).collect()
    }

    /// What holds at every moment: prefixes of before and after keep a route, what leads somewhere has its twin, and the
    /// filter judges every prefix that has a twin.
    fn check(actual: &Actual, lasting: &BTreeSet<IpNet>, cidr: &IpNet) {
        let twins = refused(actual);
        for prefix in lasting {
            assert!(actual.routes.iter().any(|route| route.prefix == *prefix), "{prefix} has no route");
        }
        for route in actual.routes.iter().filter(|route| route.link.as_deref() == Some("mesh0")) {
            assert!(twins.contains(&route.prefix), "{} has no twin", route.prefix);
        }
        let filter = actual.filter.as_ref().unwrap();
        for twin in twins.iter().filter(|twin| *twin != cidr) {
            assert!(filter.remote.contains(twin), "{twin} may leave in clear text");
        }
    }

    fn empty() -> Actual {
        let device = ActualDevice { index: 3, up: false, mtu: 1500, addresses: BTreeSet::new() };
        Actual { device: Some(device), ..Actual::default() }
    }

    fn state_with(pools: &BTreeSet<u8>) -> HostState {
        let mut facts = facts();
        let directory = std::sync::Arc::make_mut(&mut facts.directory);
        directory.pools.truncate(1);
        let pool =
            |number: &u8| crate::facts::Pool { cluster: None, prefix: format!("10.{number}.0.0/16").parse().unwrap() };
        directory.pools.extend(pools.iter().map(pool));
        host_state(&facts, &Config::default())
    }

    proptest! {
        #[test]
        fn applying_the_steps_gives_what_was_desired_and_never_opens_a_gap(
            worlds in proptest::collection::vec(proptest::collection::btree_set(2_u8..9, 0..5), 1..5),
            lost in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let mut actual = empty();
            let cidr: IpNet = "10.1.1.0/24".parse().unwrap();
            for pools in &worlds {
                let desired = state_with(pools);
                let wanted: BTreeSet<_> = desired.routes.iter().map(|route| route.prefix).collect();
                let had: BTreeSet<_> = actual.routes.iter().map(|route| route.prefix).collect();
                let lasting = wanted.intersection(&had).copied().collect();
                for action in diff(&desired, &actual) {
                    step(&mut actual, &action);
                    check(&actual, &lasting, &cidr);
                }
                prop_assert!(diff(&desired, &actual).is_empty(), "{:?}", diff(&desired, &actual));
                actual.routes.sort();
                prop_assert_eq!(&actual.routes, &desired.routes);
                prop_assert_eq!(actual.filter.as_ref(), Some(&desired.filter));
            }
            // Somebody flushes routes, rules, addresses: the next round brings all of it back.
            let desired = state_with(&worlds[worlds.len() - 1]);
            for index in lost {
                if !actual.routes.is_empty() {
                    let at = index.index(actual.routes.len());
                    actual.routes.remove(at);
                }
                actual.rules.pop();
                actual.device.as_mut().unwrap().addresses.pop_first();
                actual.device.as_mut().unwrap().up = false;
            }
            for action in diff(&desired, &actual) {
                step(&mut actual, &action);
            }
            prop_assert!(diff(&desired, &actual).is_empty());
        }
    }

    #[test]
    fn without_a_device_only_what_refuses_is_put() {
        let actions = diff(&state_with(&[2].into()), &Actual::default());
        let leads =
            |action: &Action| matches!(action, Action::PutRoute(RouteState { link: Some(_), .. }) | Action::SetUp);
        assert!(!actions.iter().any(leads), "{actions:?}");
        assert!(matches!(actions[0], Action::PutFilter(_)));
        assert!(matches!(actions.last(), Some(Action::AddRule(_))));
    }

    #[test]
    fn routes_of_pods_are_left_to_the_kernel_and_others_go() {
        let desired = state_with(&[2].into());
        let mut actual = empty();
        let route = |link: &str, prefix: &str| RouteState {
            prefix: prefix.parse().unwrap(),
            metric: 0,
            link: Some(link.into()),
            source: None,
            mtu: None,
            advmss: None,
        };
        actual.routes = vec![route("mesh0123456789a", "10.1.1.9/32"), route("eth0", "10.9.0.0/16")];
        actual.pod_links.insert("mesh0123456789a".into());
        let removed: BTreeMap<_, _> = diff(&desired, &actual)
            .into_iter()
            .filter_map(|action| if let Action::RemoveRoute(route) = action { Some((route.prefix, ())) } else { None })
            .collect();
        assert_eq!(removed.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.9.0.0/16"]);
    }
}
