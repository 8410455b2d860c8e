//! What is left when things die: the plugin in the middle, meshd, the pod's namespace. DEL always ends it.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use mesh_protocol::local::{Attachment, LocalErrorCode};
use serde_json::json;
use support::{Host, Mood, Pod};

#[test]
fn killed_add_leaves_nothing_after_del() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    // The two ends: with a lease and no link, and with everything but the answer.
    for at in ["attach", "check"] {
        host.set_mood(Mood::StopsAt(at));
        let mut child = host.spawn_for("ADD", &pod, &host.config("1.1.0"));
        let stopped = host.wait_for_stop();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((host.leases().len(), host.links().len()), (1, usize::from(at == "check")));
        host.set_mood(Mood::Well);
        drop(stopped);
        host.del(&pod);
        host.assert_clean();
        assert!(!pod.has_eth0());
    }
    // And everywhere between.
    for step in 0..60 {
        let mut child = host.spawn_for("ADD", &pod, &host.config("1.1.0"));
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(step * 150) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // meshd may be about to answer the request of a plugin that is gone.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            host.del(&pod);
            if host.leases().is_empty() || Instant::now() > deadline {
                break;
            }
        }
        host.assert_clean();
        assert!(!pod.has_eth0());
    }
    host.add(&pod);
}

#[test]
fn del_succeeds_when_anything_is_gone() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    // A pod never seen.
    host.del(&pod);
    // Twice.
    host.add(&pod);
    host.del(&pod);
    host.del(&pod);
    // Without namespace, with a result that is none.
    host.add(&pod);
    let mut config = host.config("1.1.0");
    config["prevResult"] = json!("garbage");
    let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0")];
    assert_eq!(host.run(&variables, &config.to_string()).code, 0);
    host.assert_clean();
    let gone = [&variables[..], &[("CNI_NETNS", "/nowhere")]].concat();
    assert_eq!(host.run(&gone, &config.to_string()).code, 0);
    // The namespace, and with it the link, ended first.
    let short = Pod::new("short");
    host.add(&short);
    let container = short.container.clone();
    drop(short);
    let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", container.as_str()), ("CNI_IFNAME", "eth0")];
    assert_eq!(host.run(&variables, &config.to_string()).code, 0);
    host.assert_clean();
}

#[test]
fn del_without_meshd_frees_the_kernel_and_queues_the_release() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    host.add(&pod);
    host.stop_meshd();
    host.del(&pod);
    host.del(&pod);
    assert!(!pod.has_eth0() && host.links().is_empty() && host.route_count() == 0);
    assert_eq!(host.queued(), [pod.attachment().file_name()], "one whole file, no temporary one");
    let file = host.state_dir().join("released").join(pod.attachment().file_name());
    let queued: Attachment = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(queued, pod.attachment());
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(file.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn del_queues_the_release_whenever_meshd_does_not_confirm_it() {
    for mood in [Mood::HangsUp, Mood::Refuses(LocalErrorCode::Internal), Mood::Says("{}\n")] {
        let (host, pod) = (Host::new(), Pod::new("a"));
        host.set_mood(mood);
        host.del(&pod);
        assert_eq!(host.queued().len(), 1);
    }
}

#[test]
fn del_does_not_get_stuck_on_a_disk_that_cannot_be_written() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    host.add(&pod);
    host.stop_meshd();
    std::fs::write(host.state_dir(), "a file where the directory should be").unwrap();
    let ran = host.run_for("DEL", &pod, &host.config("1.1.0"));
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{ran:?}");
    assert!(ran.err.contains("queueing the release"), "{ran:?}");
    assert!(!pod.has_eth0());
}

#[test]
fn plugin_starts_and_answers_in_milliseconds() {
    let host = Host::new();
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let start = Instant::now();
            host.run(&[("CNI_COMMAND", "VERSION")], "{}");
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("VERSION: least {:?}, median {:?}", times[0], times[10]);
    assert!(times[0] < Duration::from_millis(100), "{times:?}");
}
