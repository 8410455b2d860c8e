//! Namespaces, links, addresses, neighbours and settings, each in namespaces of the test's own.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod support;

use mesh_hostnet::{
    Error, Handle,
    address::{Address, Scope},
    link::{LinkChange, Mac, VethEnd},
    netns::{self, Netns},
    sysctl,
};
use support::{netns, pair};

#[test]
fn veth_is_made_with_its_far_end_in_the_other_namespace() {
    let (here, pod) = (netns(), netns());
    let mut host = Handle::open_in(&here).unwrap();
    let mut inside = Handle::open_in(&pod).unwrap();
    let mac: Mac = "02:00:00:00:00:07".parse().unwrap();
    let near = VethEnd { mtu: Some(1400), group: Some(7100), ..VethEnd::new("mesh0123456789a") };
    let far = VethEnd { mtu: Some(1400), mac: Some(mac), ..VethEnd::new("eth0") };
    let index = host.add_veth(&near, &far, Some(&pod)).unwrap();
    host.change_link(index, &LinkChange::new().alias("pod default/web").up()).unwrap();

    let link = host.link_by_name("mesh0123456789a").unwrap().unwrap();
    assert_eq!((link.index, link.mtu, link.group, link.up), (index, 1400, 7100, true));
    assert_eq!(link.alias.as_deref(), Some("pod default/web"));
    assert_eq!(link.kind.as_deref(), Some("veth"));
    assert!(host.link_by_name("eth0").unwrap().is_none(), "the far end was never here");
    let eth0 = inside.link_by_name("eth0").unwrap().unwrap();
    assert_eq!((eth0.mac, eth0.mtu, eth0.peer), (Some(mac), 1400, Some(index)));
    assert!(host.links().unwrap().contains(&link));

    let again = host.add_veth(&near, &far, Some(&pod)).unwrap_err();
    assert!(again.is_exists(), "{again}");
    host.delete_link(index).unwrap();
    host.delete_link(index).unwrap();
    host.delete_link_by_name("mesh0123456789a").unwrap();
    assert!(inside.link_by_name("eth0").unwrap().is_none(), "both ends go together");
    assert!(matches!(host.change_link(index, &LinkChange::new().up()), Err(Error::NoSuchLink { .. })));
}

#[test]
fn links_are_renamed_moved_and_put_on_a_bridge() {
    let (here, there) = (netns(), netns());
    let mut handle = Handle::open_in(&here).unwrap();
    let bridge = handle.add_bridge("br0").unwrap();
    let port = handle.add_veth(&VethEnd::new("a"), &VethEnd::new("b"), None).unwrap();
    handle.change_link(port, &LinkChange::new().master(bridge).mtu(1300).name("port")).unwrap();
    let link = handle.link_by_index(port).unwrap().unwrap();
    assert_eq!((link.name.as_str(), link.master, link.mtu), ("port", Some(bridge), 1300));
    handle.change_link(port, &LinkChange::new().master(0)).unwrap();
    assert_eq!(handle.link_by_index(port).unwrap().unwrap().master, None);

    let other = handle.link_by_name("b").unwrap().unwrap();
    handle.change_link(other.index, &LinkChange::new().netns(&there)).unwrap();
    assert!(handle.link_by_name("b").unwrap().is_none());
    let moved = Handle::open_in(&there).unwrap().link_by_name("b").unwrap().unwrap();
    assert_eq!(moved.mac, other.mac);
}

#[test]
fn impossible_names_are_refused_before_the_kernel_sees_them() {
    let mut handle = Handle::open_in(&netns()).unwrap();
    for name in ["", "a/b", "..", "sixteen-bytes-xx", "a b", "a:1"] {
        assert!(matches!(handle.link_by_name(name), Err(Error::Invalid { .. })), "{name}");
    }
}

#[test]
fn addresses_are_usable_at_once_and_replaced_in_place() {
    let mut pair = pair();
    let net = "fd77::5/128".parse().unwrap();
    let address = Address::plain(pair.l, net);
    pair.near.replace_address(&address).unwrap();
    pair.near.replace_address(&address).unwrap();
    let gateway = Address { scope: Scope::Link, ..Address::plain(pair.l, "169.254.1.1/32".parse().unwrap()) };
    pair.near.replace_address(&gateway).unwrap();
    let all = pair.near.addresses().unwrap();
    assert!(all.contains(&address), "{all:?}");
    assert!(all.contains(&Address { no_dad: false, ..gateway.clone() }), "{all:?}");
    assert!(all.iter().all(|address| !address.net.to_string().starts_with("fe80")), "no link-local was asked for");
    pair.left.run(|| std::net::UdpSocket::bind("[fd77::5]:0").unwrap()).unwrap();

    pair.near.delete_address(pair.l, net).unwrap();
    pair.near.delete_address(pair.l, net).unwrap();
    assert!(!pair.near.addresses().unwrap().contains(&address));
    assert!(pair.near.replace_address(&Address::plain(999, net)).unwrap_err().is_not_found());
}

#[test]
fn permanent_neighbours_are_set_and_removed() {
    let mut pair = pair();
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    for ip in ["169.254.1.1".parse().unwrap(), "fe80::1".parse().unwrap()] {
        pair.near.replace_neighbour(pair.l, ip, Mac([2; 6])).unwrap();
        pair.near.replace_neighbour(pair.l, ip, mac).unwrap();
        let all = pair.near.neighbours().unwrap();
        let entry = all.iter().find(|entry| entry.ip == ip).unwrap();
        assert_eq!((entry.link, entry.mac, entry.permanent), (pair.l, Some(mac), true));
        pair.near.delete_neighbour(pair.l, ip).unwrap();
        pair.near.delete_neighbour(pair.l, ip).unwrap();
        assert!(pair.near.neighbours().unwrap().iter().all(|entry| entry.ip != ip));
    }
}

#[test]
fn named_namespaces_come_and_go() {
    let name = format!("hostnet-{}-named", std::process::id());
    let made = Netns::create_named(&name).unwrap();
    assert!(Netns::create_named(&name).unwrap_err().is_exists());
    assert_eq!(Netns::open_named(&name).unwrap().inode().unwrap(), made.inode().unwrap());
    assert!(netns::list_named().unwrap().contains(&name));
    let inside = made.run(|| Netns::current().unwrap().inode().unwrap()).unwrap();
    assert_eq!(inside, made.inode().unwrap());
    assert_ne!(Netns::current().unwrap().inode().unwrap(), inside, "the caller stayed where it was");

    let mut command = std::process::Command::new("readlink");
    command.arg("/proc/self/ns/net");
    made.attach_command(&mut command).unwrap();
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("net:[{inside}]"));

    netns::delete_named(&name).unwrap();
    netns::delete_named(&name).unwrap();
    assert!(Netns::open_named(&name).unwrap_err().is_not_found());
    assert!(matches!(Netns::open_named("../x"), Err(Error::Invalid { .. })));
    assert!(matches!(Netns::open("/etc/hostname"), Err(Error::Invalid { .. })));
    assert!(matches!(Netns::open("/proc/self/ns/uts"), Err(Error::Invalid { .. })));
}

#[test]
fn settings_belong_to_the_namespace_of_the_thread() {
    let pair = pair();
    let key = sysctl::Key::ipv4_link("l", "rp_filter").unwrap();
    let (first, second, read) = pair
        .left
        .run(|| {
            sysctl::write(&key, "0").unwrap();
            (sysctl::ensure(&key, "2").unwrap(), sysctl::ensure(&key, "2").unwrap(), sysctl::read(&key).unwrap())
        })
        .unwrap();
    assert_eq!((first, second, read.as_str()), (true, false, "2"));
    assert!(sysctl::read(&key).unwrap_err().is_not_found(), "link l is not in the caller's namespace");
    pair.right.run(|| sysctl::write(&sysctl::Key::ipv6_forwarding(), "1").unwrap()).unwrap();
    assert!(sysctl::Key::net("ipv4/../../kernel/hostname").is_err());
    assert!(sysctl::Key::ipv6_link("../all", "forwarding").is_err());
}
