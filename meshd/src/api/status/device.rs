//! The device and its lanes: what the kernel gives and takes, and what it refused.

use mesh_dataplane::Snapshot;
use mesh_dataplane::command::LaneSnapshot;
use mesh_dataplane::selfcheck::Class;
use mesh_protocol::local::{DeviceStatus, OffloadStatus, SocketStatus};

use super::count;
use crate::app::Node;
use crate::desired;
use crate::facts::Facts;
use crate::offloads::Choice;

/// The device.
pub(super) fn status(node: &Node, facts: &Facts, snapshot: &Snapshot) -> DeviceStatus {
    let port = node.config.device.port;
    DeviceStatus {
        name: node.config.device.name.clone(),
        mode: node.mode_name().into(),
        lanes: count(node.engine.lanes()),
        fewer_lanes: node.fewer_lanes.clone(),
        port,
        mtu: desired::device_mtu(facts, &node.config),
        offloads: offloads(&node.offloads, node.mode_name(), &snapshot.lanes),
        offloads_untried: node.offloads.untried.clone(),
        sockets: snapshot.lanes.iter().map(|lane| socket(lane, port)).collect(),
    }
}

/// Every kind of offload, as all lanes have it.
pub(crate) fn offloads(choice: &Choice, mode: &str, lanes: &[LaneSnapshot]) -> Vec<OffloadStatus> {
    let status = |class: Class| {
        let on = !lanes.is_empty() && lanes.iter().all(|lane| class.is_on(lane.offloads, lane.socket.trains));
        let found = || match choice.off.get(&class) {
            Some(reason) => reason.clone(),
            None if mode == "plain" && !matches!(class, Class::UdpSegment | Class::UdpGro) => {
                "the device is plain".into()
            }
            None if lanes.iter().any(|lane| lane.refused_runs > 0) => "the kernel refused it while it was used".into(),
            None => "the kernel does not have it".into(),
        };
        OffloadStatus { name: class.as_str().into(), on, reason: (!on).then(found) }
    };
    Class::ALL.into_iter().map(status).collect()
}

fn socket(lane: &LaneSnapshot, base: u16) -> SocketStatus {
    SocketStatus {
        lane: count(lane.lane),
        port: base.saturating_add(u16::try_from(lane.lane).unwrap_or_default()),
        asked_buffer: lane.socket.asked_buffer as u64,
        receive_buffer: lane.socket.receive_buffer as u64,
        send_buffer: lane.socket.send_buffer as u64,
        refused_trains: lane.socket.refused_trains,
        refused_super_packets: lane.refused_runs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_dataplane::packet::offload::Offloads;
    use mesh_dataplane::udp::{SocketState, Trains};

    #[test]
    fn what_is_off_says_why() {
        let socket = SocketState { trains: Trains { send: true, receive: false }, ..SocketState::default() };
        let offloads_of = |offloads| LaneSnapshot { offloads, socket, ..LaneSnapshot::default() };
        let lanes = [offloads_of(Offloads::ALL), offloads_of(Offloads { uso: false, ..Offloads::ALL })];
        let choice = Choice { off: [(Class::UdpGro, "wrong bytes".to_owned())].into(), ..Choice::default() };
        let off = |mode, lanes: &[LaneSnapshot]| -> Vec<(String, String)> {
            let all = offloads(&choice, mode, lanes);
            all.into_iter().filter_map(|status| Some((status.name, status.reason?))).collect()
        };
        let expected = [("uso", "the kernel does not have it"), ("udp-gro", "wrong bytes")];
        assert_eq!(off("fast", &lanes), expected.map(|(name, why)| (name.to_owned(), why.to_owned())));
        assert_eq!(off("plain", &[offloads_of(Offloads::NONE)])[0].1, "the device is plain");
        let refused =
            LaneSnapshot { refused_runs: 1, ..offloads_of(Offloads { tcp_coalesce: false, ..Offloads::ALL }) };
        assert_eq!(off("fast", &[refused])[0].1, "the kernel refused it while it was used");
    }
}
