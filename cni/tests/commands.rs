//! Every command and version: what goes in, what comes out, and nothing else.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use mesh_hostnet::Handle;
use mesh_hostnet::link::VethEnd;
use mesh_protocol::local::{LocalErrorCode, LocalRequest};
use serde_json::{Value, json};
use support::{Host, Mood, Pod};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn result_of_add_has_the_form_of_its_version() {
    let old = r#"{"cniVersion":"VERSION","interfaces":[{"name":"HOST","mac":"02:6d:65:73:68:01"},{"name":"eth0","mac":"MAC","sandbox":"NETNS"}],"ips":[{"version":"4","address":"10.1.0.2/32","gateway":"169.254.1.1","interface":1},{"version":"6","address":"fd00:1::2/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]}"#;
    let one = old.replace(r#""version":"4","#, "").replace(r#""version":"6","#, "");
    let newest = one.replace(r#"01"},"#, r#"01","mtu":1420},"#).replace(r#""MAC","#, r#""MAC","mtu":1420,"#);
    for (version, golden) in VERSIONS.iter().zip([old, old, &one, &newest]) {
        let (host, pod) = (Host::new(), Pod::new("a"));
        let ran = host.run_for("ADD", &pod, &host.config(version));
        let result: Value = serde_json::from_str(&ran.out).unwrap();
        let mac = result["interfaces"][1]["mac"].as_str().unwrap();
        let expected = golden
            .replace("VERSION", version)
            .replace("HOST", &pod.attachment().host_link())
            .replace("NETNS", &pod.path())
            .replace("MAC", mac);
        assert_eq!(ran.out, format!("{expected}\n"));
        host.run_for("DEL", &pod, &host.config(version));
        host.assert_clean();
    }
}

#[test]
fn versions_are_listed_and_the_asked_one_is_echoed() {
    let host = Host::new();
    let list = r#""supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}"#;
    for (input, echoed) in [(r#"{"cniVersion":"1.0.0"}"#, "1.0.0"), ("", "1.1.0"), (r#"{"cniVersion":"9.9"}"#, "9.9")] {
        let ran = host.run(&[("CNI_COMMAND", "VERSION")], input);
        assert_eq!((ran.code, ran.out), (0, format!("{{\"cniVersion\":\"{echoed}\",{list}\n")));
    }
}

#[test]
fn every_wrong_input_has_its_code_and_changes_nothing() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    let config = host.config("1.1.0").to_string();
    let (netns, long) = (pod.path(), "a".repeat(300));
    let with = |change: (&'static str, &str), input: &str| {
        let mut variables =
            vec![("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", &netns)];
        variables.retain(|(name, _)| *name != change.0);
        if change.1 != "absent" {
            variables.push(change);
        }
        host.run(&variables, input)
    };
    for (name, value) in [
        ("CNI_COMMAND", "absent"),
        ("CNI_COMMAND", "add"),
        ("CNI_CONTAINERID", "absent"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../a"),
        ("CNI_CONTAINERID", &long),
        ("CNI_IFNAME", "absent"),
        ("CNI_IFNAME", "../eth0"),
        ("CNI_IFNAME", "sixteen-letters-"),
        ("CNI_NETNS", "absent"),
        ("CNI_NETNS", "relative"),
        ("CNI_NETNS", "/nowhere/at/all"),
        ("CNI_NETNS", "/etc/passwd"),
        ("CNI_NETNS", "/proc/self/ns/net"),
    ] {
        with((name, value), &config).fails(4, name);
    }
    let same = ("CNI_IFNAME", "eth0");
    for (input, code, part) in [
        ("", 6, "empty"),
        ("not json", 6, "decode"),
        ("{\"cniVersion\":", 6, "decode"),
        (r#"["1.0.0"]"#, 6, "decode"),
        ("{}", 1, "0.1.0"),
        (r#"{"cniVersion":"9.9"}"#, 1, "9.9"),
        (r#"{"cniVersion":"1.0.0","socket":"x"}"#, 7, "socket"),
        (r#"{"cniVersion":"1.0.0","mtu":{}}"#, 7, "configuration"),
        (r#"{"cniVersion":"1.0.0","prevResult":{}}"#, 7, "mesh-cni first"),
        (r#"{"cniVersion":"1.0.0","mode":"chained"}"#, 7, "prevResult"),
    ] {
        with(same, input).fails(code, part);
    }
    with(same, &"[".repeat(100_000)).fails(6, "decode");
    with(same, &" ".repeat(5 << 20)).fails(6, "longer");
    assert!(with(same, r#"{"cniVersion":"9.9"}"#).out.starts_with(r#"{"cniVersion":"9.9","code":1,"#));
    assert_eq!(host.asked(), []);
    host.assert_clean();
}

#[test]
fn old_versions_do_not_have_the_new_commands() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    host.run_for("CHECK", &pod, &host.config("0.3.1")).fails(1, "CHECK");
    for version in &VERSIONS[..3] {
        host.run_for("STATUS", &pod, &host.config(version)).fails(1, "STATUS");
        host.run_for("GC", &pod, &host.config(version)).fails(1, "GC");
    }
}

#[test]
fn status_tells_whether_pods_can_be_attached() {
    let host = Host::new();
    let status = || host.run(&[("CNI_COMMAND", "STATUS")], &host.config("1.1.0").to_string());
    let ran = status();
    assert_eq!((ran.code, ran.out.as_str()), (0, ""));
    host.set_mood(Mood::Refuses(LocalErrorCode::PoolExhausted));
    status().fails(50, "pool exhausted");
    host.set_mood(Mood::Refuses(LocalErrorCode::NotReady));
    status().fails(51, "refused");
    host.stop_meshd();
    status().fails(51, "does not run");
}

#[test]
fn check_sees_what_is_missing() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    let mut config = host.config("1.1.0");
    host.run_for("CHECK", &pod, &config).fails(3, "no such pod");
    config["prevResult"] = host.add(&pod);
    let check = || host.run_for("CHECK", &pod, &config);
    let ran = check();
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{ran:?}");
    let mut other = config.clone();
    other["prevResult"]["ips"] = json!([]);
    host.run_for("CHECK", &pod, &other).fails(102, "prevResult");

    // What another plugin adds is none of our business.
    let mut inside = Handle::open_in(&pod.netns).unwrap();
    inside.add_veth(&VethEnd::new("net1"), &VethEnd::new("net2"), None).unwrap();
    assert_eq!(check().code, 0);

    let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
    let lease = host.leases().remove(0);
    inside.delete_neighbour(eth0, "fe80::1".parse().unwrap()).unwrap();
    check().fails(102, "fe80::1");
    inside.delete_address(eth0, lease.addresses[0].into()).unwrap();
    check().fails(102, "lost its address 10.1.0.2");
    host.netns.run(|| Handle::open().unwrap().delete_link_by_name(&pod.attachment().host_link())).unwrap().unwrap();
    check().fails(102, "is gone");
    host.stop_meshd();
    check().fails(11, "does not run");
}

#[test]
fn gc_frees_what_is_not_listed_and_nothing_without_a_list() {
    let (host, kept, stale) = (Host::new(), Pod::new("kept"), Pod::new("stale"));
    host.add(&kept);
    host.add(&stale);
    let other = VethEnd::new("veth-other");
    Handle::open_in(&host.netns).unwrap().add_veth(&other, &VethEnd::new("veth-end"), None).unwrap();
    let gc = |attachments: Option<Value>| {
        let mut config = host.config("1.1.0");
        if let Some(list) = attachments {
            config["cni.dev/valid-attachments"] = list;
        }
        host.run(&[("CNI_COMMAND", "GC")], &config.to_string())
    };
    gc(None).fails(7, "valid-attachments");
    gc(Some(json!([{"containerID": 7}]))).fails(7, "valid-attachments");
    assert_eq!((host.links().len(), host.leases().len()), (2, 2));

    let ran = gc(Some(json!([{"containerID": "kept", "ifname": "eth0"}])));
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{ran:?}");
    assert!(kept.has_eth0() && !stale.has_eth0());
    assert_eq!(host.leases()[0].attachment, kept.attachment());
    assert_eq!(host.leases().len(), 1);

    assert_eq!(gc(Some(json!([]))).code, 0);
    host.assert_clean();
    assert!(Handle::open_in(&host.netns).unwrap().link_by_name("veth-other").unwrap().is_some());
    host.stop_meshd();
    gc(Some(json!([]))).fails(11, "does not run");
}

#[test]
fn chained_passes_the_result_through_once_the_host_is_guarded() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    // Numbers, order and spaces as no encoder would write them.
    let previous = r#"{ "ips":[{"address":"10.9.0.5/24"}], "cniVersion":"1.0.0", "x":1.0e2, "dns":{} }"#;
    let config = format!(
        r#"{{"cniVersion":"1.0.0","mode":"chained","socket":"{}","prevResult":{previous}}}"#,
        host.socket().display()
    );
    let run = |command| {
        let netns = pod.path();
        let variables =
            [("CNI_COMMAND", command), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns.as_str())];
        host.run(&variables, &config)
    };
    assert_eq!(run("ADD").out, format!("{previous}\n"));
    for command in ["CHECK", "DEL"] {
        let ran = run(command);
        assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{command}");
    }
    host.set_mood(Mood::Refuses(LocalErrorCode::NotReady));
    run("ADD").fails(11, "meshd refused");
    assert_eq!(run("DEL").code, 0);
    assert!(host.asked().iter().all(|request| *request == LocalRequest::AttachStatus), "{:?}", host.asked());
    assert!(!pod.has_eth0());
}

#[test]
fn pod_name_reaches_meshd() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    host.add(&pod);
    assert_eq!(host.leases()[0].pod.as_deref(), Some("shop/cart"));
}
