//! Packets between pods: they arrive, encrypted; those that should not, do not.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::{Marker, new_marker};
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, HttpServer, http_get, ping};
use mesh_e2e::{Capture, Mesh, Pod, wait};
use mesh_hostnet::Handle;
use mesh_hostnet::route::Route;
use socket2::{Domain, Protocol, Socket, Type};

fn echo(from: &Pod, to: IpAddr, marker: Marker) -> Result<()> {
    let first = ping(&from.netns()?, to, 1, marker)?;
    let echo = ping(&from.netns()?, to, 3, marker)?;
    ensure!(echo.times.len() == 3, "{} to {to}: {} of 3 answered ({first:?})", from.label(), echo.times.len());
    Ok(())
}

#[test]
fn pods_reach_each_other_everywhere_and_nothing_is_in_the_clear() {
    let nodes = [("east-1", "east"), ("east-2", "east"), ("west-1", "west"), ("onprem-1", "onprem")];
    scenario("reach", &nodes, |mesh| {
        let marker = new_marker();
        let capture = Capture::start(&mesh.lab, marker)?;
        let a = mesh.pod("east-1", "a")?;
        let others = [mesh.pod("east-1", "b")?, mesh.pod("east-2", "a")?, mesh.pod("west-1", "a")?];
        for other in &others {
            for (from, to) in [(&a, other), (other, &a)] {
                echo(from, to.v4(), marker)?;
                echo(from, to.v6(), marker)?;
            }
        }
        for v6 in [false, true] {
            echo(&a, mesh.node("onprem-1").mesh_address(v6)?, marker)?;
        }
        let west = &others[2];
        let text: String = marker.iter().map(|byte| format!("{byte:02x}")).collect();
        let server = HttpServer::start(&west.netns()?, west.v6(), text.clone())?;
        ensure!(http_get(&a.netns()?, server.address(), &text)? == text, "another body");
        for to in [west.v4(), west.v6()] {
            let server = BulkServer::start(&west.netns()?, to, marker)?;
            let client = BulkTransfer::start(&a.netns()?, server.address(), 20 << 20, marker)?;
            ensure!(client.finish()?.0 == server.finish()?, "bytes are missing");
        }
        let seen = capture.stop()?;
        seen.assert_nothing_clear()?;
        ensure!(seen.wireguard[1] > 0 && seen.wireguard[2] > 0 && seen.wireguard[4] > 1_000, "{seen:?}");
        Ok(())
    });
}

#[test]
fn a_pod_sends_as_itself_only() {
    scenario("spoof", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("east-1", "b")?);
        let west = mesh.pod("west-1", "a")?;
        echo(&a, west.v4(), marker)?;
        let capture_socket = listen(&west)?;
        // From the other pod's address, from a pod of a third node, and from its own, in this order.
        for source in [b.v4(), "10.1.200.7".parse()?, a.v4()] {
            send_raw(&a, source, west.v4(), marker)?;
        }
        let from = capture_socket_next(&capture_socket)?;
        ensure!(from == a.v4(), "a datagram from {from} arrived first");
        Ok(())
    });
}

#[test]
fn foreign_inner_source_is_dropped_and_counted() {
    scenario("foreign", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (a, west) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        echo(&a, west.v4(), marker)?;
        let before = dropped(mesh, "west-1")? + dropped(mesh, "east-1")?;
        let socket = listen(&west)?;
        // A hostile node: its host network switches off what would pin the source, and sends as a pod of the west. meshd puts the
        // filter back within moments, so it may take more than one try.
        let node = mesh.node("east-1").node.clone();
        let forged: Ipv4Addr = "10.2.99.9".parse()?;
        wait::until_true("drops are counted", Duration::from_secs(20), || {
            let _ = node.output("/usr/sbin/nft", &["delete", "table", "inet", "mesh"]);
            node.netns()?.run(|| -> Result<()> {
                let raw = raw_socket()?;
                for _ in 0..20 {
                    let packet = udp_packet(forged, v4(west.v4())?, marker);
                    raw.send_to(&packet, &SocketAddr::new(west.v4(), 0).into())?;
                }
                Ok(())
            })??;
            Ok(dropped(mesh, "west-1")? + dropped(mesh, "east-1")? > before)
        })?;
        // What the filter caught came as from the node, whose it is.
        while let Ok((_, from)) = socket.recv_from(&mut [0; 2048]) {
            ensure!(from.ip() != IpAddr::from(forged), "the forged datagram arrived");
        }
        Ok(())
    });
}

#[test]
fn clear_text_with_a_mesh_source_is_dropped_on_arrival() {
    scenario("clear-in", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let marker = new_marker();
        let (a, west) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        echo(&a, west.v4(), marker)?;
        let socket = listen(&west)?;
        // An attacker on the underlay routes straight to the node and claims to be a pod of the east.
        let (node, gateway) = (west.v4(), mesh.node("west-1").node.v4());
        mesh.lab.router()?.run(|| -> Result<()> {
            Handle::open()?.replace_route(&Route::via(node.into(), gateway.into()))?;
            let raw = raw_socket()?;
            for source in [a.v4(), "10.1.250.1".parse()?] {
                raw.send_to(&udp_packet(v4(source)?, v4(node)?, marker), &SocketAddr::new(node, 0).into())?;
            }
            Ok(())
        })??;
        ensure!(socket.recv(&mut [0; 2048]).is_err(), "a clear-text datagram was let in");
        echo(&a, west.v4(), marker)
    });
}

fn dropped(mesh: &Mesh, node: &str) -> Result<u64> {
    let status = mesh.node(node).status()?;
    let drops = status["dropped"].as_object().context("no drop counters")?;
    Ok(drops.iter().filter(|(reason, _)| reason.contains("source")).filter_map(|(_, count)| count.as_u64()).sum())
}

const PORT: u16 = 5_555;

fn listen(pod: &Pod) -> Result<UdpSocket> {
    let socket = pod.netns()?.run(|| UdpSocket::bind((pod.v4(), PORT)))??;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

fn capture_socket_next(socket: &UdpSocket) -> Result<IpAddr> {
    let (_, from) = socket.recv_from(&mut [0; 2048]).context("nothing arrived")?;
    Ok(from.ip())
}

fn send_raw(pod: &Pod, source: IpAddr, to: IpAddr, marker: Marker) -> Result<()> {
    pod.netns()?.run(|| -> Result<()> {
        let packet = udp_packet(v4(source)?, v4(to)?, marker);
        raw_socket()?.send_to(&packet, &SocketAddr::new(to, 0).into())?;
        Ok(())
    })?
}

fn raw_socket() -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
    Ok(socket)
}

fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => anyhow::bail!("not IPv4"),
    }
}

/// A whole IPv4 packet with a UDP datagram without checksum; the kernel fills in the header's checksum and length.
fn udp_packet(source: Ipv4Addr, to: Ipv4Addr, marker: Marker) -> Vec<u8> {
    let length = (20 + 8 + marker.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(PORT.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend((length - 20).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(marker);
    packet
}
