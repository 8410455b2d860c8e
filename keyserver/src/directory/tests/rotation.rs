//! Rotation jobs from inside: what is stored, what a round takes up, who is given up.

use mesh_protocol::admin::{RotationChange, RotationOrder, RotationState};
use mesh_protocol::control::ServerMessage;
use mesh_protocol::frame;

use super::*;

fn published(fixture: &mut Fixture) -> NodeId {
    let node = fixture.node.verify_key().node_id();
    let said = record(fixture, 1);
    fixture.directory.publish(node, &said).unwrap();
    node
}

fn asked(opening: &mut crate::directory::Opening) -> Vec<(u64, bool, Option<u64>)> {
    let mut asked = Vec::new();
    while let Ok(frame) = opening.rest.try_recv() {
        if let Ok(ServerMessage::Rotate { request, force, after }) = frame::decode(&frame[4..]) {
            asked.push((request, force, after));
        }
    }
    asked
}

#[test]
fn a_node_that_does_not_come_for_a_day_is_left_to_its_own_schedule() {
    let mut fixture = directory(0);
    published(&mut fixture);
    let directory = &mut fixture.directory;
    let job = directory.order_rotation(&RotationOrder::default()).unwrap();
    let state = |directory: &mut Directory| directory.list_rotations().0[0].state;
    assert_eq!(state(directory), RotationState::Waiting);
    directory.rotations.backdate(job, 86_300);
    directory.drive_rotations_now();
    assert_eq!(state(directory), RotationState::Waiting);
    directory.rotations.backdate(job, 200);
    directory.drive_rotations_now();
    let (jobs, _) = directory.list_rotations();
    assert_eq!((jobs[0].state, jobs[0].failed[0].error.contains("not connected")), (RotationState::Done, true));
}

#[test]
fn orders_that_cannot_be_meant_are_refused_and_nothing_is_stored() {
    let mut fixture = directory(0);
    published(&mut fixture);
    let directory = &mut fixture.directory;
    let order = RotationOrder::default();
    let cases = [
        (RotationOrder { nodes: vec!["nobody".into()], ..order.clone() }, "no node nobody"),
        (RotationOrder { cluster: Some("west".parse().unwrap()), ..order.clone() }, "no cluster west"),
        (RotationOrder { wave: Some(0), ..order.clone() }, "1 to 100"),
        (RotationOrder { wave: Some(101), ..order.clone() }, "1 to 100"),
        (RotationOrder { every: Some(600), force: true, ..order.clone() }, "an hour"),
        (RotationOrder { every: Some(3600), ..order.clone() }, "--force"),
    ];
    for (order, words) in cases {
        let refused = directory.order_rotation(&order).unwrap_err();
        assert!(refused.message.contains(words), "{refused}");
        assert_eq!(directory.plan_rotation(&order).unwrap_err(), refused, "a dry run says the same");
    }
    assert!(directory.list_rotations().0.is_empty());
    for _ in 0..16 {
        directory.order_rotation(&order).unwrap();
    }
    assert_eq!(directory.order_rotation(&order).unwrap_err().code, RefusalCode::Busy);
    assert_eq!(directory.change_rotation(None, RotationChange::Cancel).unwrap().len(), 16);
    assert_eq!(directory.change_rotation(Some(1), RotationChange::Resume).unwrap_err().code, RefusalCode::Taken);
    assert_eq!(directory.change_rotation(Some(99), RotationChange::Pause).unwrap_err().code, RefusalCode::Token);
    for _ in 0..100 {
        let job = directory.order_rotation(&order).unwrap();
        directory.change_rotation(Some(job), RotationChange::Cancel).unwrap();
    }
    assert_eq!(directory.list_rotations().0.len(), 64, "the oldest are forgotten");
    assert_eq!(directory.store.range(&Range::prefix(layout::ROTATIONS), None, 999).unwrap().len(), 64);
}

#[test]
fn a_held_job_asks_nobody_and_a_later_one_waits_for_its_time() {
    let mut fixture = directory(0);
    let node = published(&mut fixture);
    let hello = hello(&fixture.directory);
    let directory = &mut fixture.directory;
    let mut opening = directory.open_session(node, peer(), &hello).unwrap();
    let later = RotationOrder { at: Some(unix_now() + 3600), ..RotationOrder::default() };
    directory.order_rotation(&later).unwrap();
    assert!(asked(&mut opening).is_empty());
    let job = directory.order_rotation(&RotationOrder::default()).unwrap();
    let first = asked(&mut opening);
    assert!(matches!(first[..], [(_, false, Some(1))]), "{first:?}");
    directory.change_rotation(Some(job), RotationChange::Pause).unwrap();
    let mut again = directory.open_session(node, peer(), &hello).unwrap();
    assert!(asked(&mut again).is_empty(), "held");
    directory.change_rotation(Some(job), RotationChange::Resume).unwrap();
    assert_eq!(asked(&mut again), first, "the same request");
    let states: Vec<RotationState> = directory.list_rotations().0.iter().map(|job| job.state).collect();
    assert_eq!(states, [RotationState::Running, RotationState::Scheduled]);
    directory.rotations.backdate(1, 3601);
    directory.drive_rotations_now();
    assert_eq!(asked(&mut again).len(), 1, "its time came");
}
