#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;

use mesh_protocol::local::RELEASED_DIR;

use super::*;

fn start(dir: &std::path::Path, cidr: &str) -> Pods {
    let state = StateDir::open(&dir.join("state")).unwrap();
    Pods::start(state, &Config::default(), vec![cidr.parse().unwrap()], Vec::new(), 1420).unwrap()
}

fn who(number: usize) -> Attachment {
    Attachment { container: format!("c{number}"), interface: "eth0".into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_at_once_get_distinct_addresses_that_survive_a_restart() {
    let temp = tempfile::tempdir().unwrap();
    let mut pods = start(temp.path(), "10.1.1.0/24");
    let asked = (0..200).map(|number| pods.attach(who(number), None));
    let mut leases = Vec::new();
    let mut distinct = BTreeSet::new();
    // All are in the queue before the first is awaited.
    let waiting: Vec<_> = asked.map(Box::pin).collect();
    for lease in futures_in_order(waiting).await {
        let lease = lease.unwrap();
        assert!(distinct.insert(lease.addresses[0]));
        leases.push(lease);
    }
    pods.stop();
    let mut pods = start(temp.path(), "10.1.1.0/24");
    assert_eq!(pods.leases.borrow().len(), 200);
    assert_eq!(pods.attach(who(3), None).await.unwrap(), leases[3], "the same attachment gets the same lease");
    pods.stop();
}

/// Polls all together and gives the results in order.
async fn futures_in_order<F: Future + Unpin>(mut futures: Vec<F>) -> Vec<F::Output> {
    let mut results: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut pending = false;
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none() {
                match std::pin::Pin::new(future).poll(context) {
                    std::task::Poll::Ready(value) => *result = Some(value),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    results.into_iter().flatten().collect()
}

#[tokio::test]
async fn releases_queued_while_down_are_taken_at_start_and_nonsense_is_dropped() {
    let temp = tempfile::tempdir().unwrap();
    let mut pods = start(temp.path(), "10.1.1.0/24");
    pods.attach(who(1), None).await.unwrap();
    pods.attach(who(2), None).await.unwrap();
    pods.stop();
    let dir = temp.path().join("state").join(RELEASED_DIR);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(who(1).file_name()), serde_json::to_vec(&who(1)).unwrap()).unwrap();
    fs::write(dir.join("junk.json"), b"{").unwrap();
    fs::write(dir.join("half.tmp"), b"{").unwrap();
    // Named for one, holding another: not believed.
    fs::write(dir.join(who(3).file_name()), serde_json::to_vec(&who(2)).unwrap()).unwrap();
    let mut pods = start(temp.path(), "10.1.1.0/24");
    let deadline = Instant::now() + Duration::from_secs(10);
    while pods.leases.borrow().len() != 1 && Instant::now() < deadline {
        let _ = tokio::time::timeout(Duration::from_millis(100), pods.leases.changed()).await;
    }
    assert_eq!(pods.leases.borrow()[0].attachment, who(2));
    assert!(pods.check(who(1)).await.unwrap().is_none());
    let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["half.tmp"]);
    pods.stop();
}

#[tokio::test]
async fn a_full_pool_says_so_and_collect_makes_room() {
    let temp = tempfile::tempdir().unwrap();
    let mut pods = start(temp.path(), "10.1.1.0/30");
    pods.attach(who(1), None).await.unwrap();
    let error = pods.attach(who(2), None).await.unwrap_err();
    assert_eq!(error.code, LocalErrorCode::PoolExhausted);
    assert!(error.message.contains("pool exhausted") && error.message.contains("10.1.1.0/30"), "{error}");
    assert_eq!(pods.room().await.unwrap_err().code, LocalErrorCode::PoolExhausted);
    assert_eq!(pods.collect([who(9)].into()).await.unwrap(), 1);
    pods.room().await.unwrap();
    pods.attach(who(2), None).await.unwrap();
    pods.detach(who(7)).await.unwrap();
    pods.stop();
}
