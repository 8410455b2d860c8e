//! Time of each part of a packet's way, with the bare AEAD beside it.
#![allow(missing_docs, clippy::disallowed_methods, reason = "a bench: it reads the clock")]

mod ways;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use mesh_dataplane::packet::flow::FlowHash;
use ways::{Aead, Joiner, Lookup, Pair, TRAIN, Train};

/// Messages sealed at a time before they are opened; within any replay window.
const CHUNK: u64 = 64;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    seal(&mut criterion);
    open(&mut criterion);
    trains(&mut criterion);
    lookups(&mut criterion);
    criterion.final_summary();
}

fn seal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal");
    for len in [64, 1420] {
        group.throughput(Throughput::Bytes(len as u64));
        let (mut aead, mut buffer) = (Aead::new(), vec![1; len + 16]);
        group.bench_function(format!("aead/{len}"), |bencher| bencher.iter(|| aead.seal(black_box(&mut buffer))));
        let (mut pair, mut packet) = (Pair::new(), ways::datagram(len));
        group.bench_function(format!("lane/{len}"), |bencher| {
            bencher.iter(|| pair.seal(black_box(&mut packet), len));
        });
    }
    group.finish();
}

fn open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("open");
    for len in [64, 1420] {
        group.throughput(Throughput::Bytes(len as u64));
        let mut aead = Aead::new();
        let mut buffers = vec![vec![1; len + 16]; CHUNK as usize];
        opens(&mut group, &format!("aead/{len}"), |count| {
            buffers[..count].iter_mut().for_each(|buffer| aead.seal(buffer));
            let start = Instant::now();
            for (buffer, back) in buffers[..count].iter_mut().zip((0..count as u64).rev()) {
                aead.open(black_box(buffer), back);
            }
            start.elapsed()
        });
        let (mut pair, mut packet) = (Pair::new(), ways::datagram(len));
        opens(&mut group, &format!("lane/{len}"), |count| {
            let sealed: Vec<Vec<u8>> = (0..count)
                .map(|_| {
                    pair.seal(&mut packet, len);
                    pair.sealed.datagrams.get(0).expect("a datagram").1.to_vec()
                })
                .collect();
            let start = Instant::now();
            for datagram in &sealed {
                assert_eq!(pair.open(black_box(datagram)), 1);
            }
            start.elapsed()
        });
    }
    group.finish();
}

/// Messages can be opened once only: some are made, and only opening them is timed.
fn opens(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut chunk: impl FnMut(usize) -> Duration) {
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|mut left| {
            let mut time = Duration::ZERO;
            while left > 0 {
                let count = left.min(CHUNK);
                time += chunk(count as usize);
                left -= count;
            }
            time
        });
    });
}

fn trains(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("train");
    // One unit is one packet of the train.
    group.throughput(Throughput::Elements(TRAIN as u64));
    let mut train = Train::new();
    group.bench_function("segment", |bencher| bencher.iter(|| black_box(&mut train).cut()));
    let (mut pair, mut train) = (Pair::new(), Train::new());
    group.bench_function("segment and seal", |bencher| bencher.iter(|| pair.seal_train(black_box(&mut train))));
    let mut joiner = Joiner::new();
    assert_eq!(joiner.join(), 1, "one flow is one run");
    group.bench_function("coalesce", |bencher| bencher.iter(|| black_box(&mut joiner).join()));
    group.finish();
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    let mut lookup = Lookup::new();
    group.bench_function(format!("prefix of {} peers", Lookup::PEERS), |bencher| {
        bencher.iter(|| lookup.next().expect("every address has an owner"));
    });
    let (hash, packet) = (FlowHash::new([3; 16]), ways::datagram(64));
    group.bench_function("lane of a flow", |bencher| bencher.iter(|| ways::lane_of(&hash, black_box(&packet))));
    group.finish();
}
