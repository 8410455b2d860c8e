# Mesh. The two commands to know: `make demo` shows it at work, `make test` proves it. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Root may install; `make setup` of anybody else prints what is missing.
PREFIX ?= /usr/local
DESTDIR ?=
CNI_BIN_DIR ?= /opt/cni/bin
UNIT_DIR ?= /etc/systemd/system
FUZZ_SECONDS ?= 30
# DEMO_EXIT=1 ends the demo by itself, on the command line or in the environment.
export DEMO_EXIT

# command:Debian package. The programs of Mesh need none of these at run time; the tests and the demo look from outside
# with them and let a real runtime and a plain WireGuard device take part.
TOOLS := gcc:gcc ip:iproute2 ping:iputils-ping nft:nftables wg:wireguard-tools wireguard-go:wireguard-go containerd:containerd runc:runc \
         catatonit:catatonit busybox:busybox-static systemd-analyze:systemd ethtool:ethtool
# Rivals of the bench; one that cannot be had is left out and named in the results.
RIVAL_PACKAGES := wireguard-go:wireguard-go nebula:nebula
RIVAL_CRATES := boringtun-cli:boringtun-cli@0.7.1 gotatun:gotatun-cli@0.10.2
# For the bench, such as BENCH='--wireguard-go PATH --rounds 5'.
BENCH ?=
# For the rotation bench, such as ROTATION='--nodes 2,20 --rotations 5'.
ROTATION ?=

# Workspaces of their own: the simulation and the fuzz targets.
SIM := dataplane/sim/Cargo.toml
APART := $(wildcard $(SIM) dataplane/fuzz/Cargo.toml protocol/fuzz/Cargo.toml wg/fuzz/Cargo.toml)

.PHONY: help setup root interop demo test bench bench-quick bench-rotation bench-rivals fmt fmt-check lint doc build unit sim scale audit fuzz install \
        soak flood systemd

help: ## lists the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: ## installs what the demo and the tests need (Debian, as root); else says what is missing
	@missing=()
	for tool in $(TOOLS); do
	  command -v "$${tool%%:*}" >/dev/null || missing+=("$${tool##*:}")
	done
	# The container image of the runtime test is made of a busybox that needs no libraries.
	if command -v busybox >/dev/null && ldd "$$(command -v busybox)" >/dev/null 2>&1; then missing+=(busybox-static); fi
	[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
	if [ $${#missing[@]} -gt 0 ]; then
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    echo "setup: installing $${missing[*]}"
	    log=$$(mktemp)
	    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${missing[@]}"; } \
	        >"$$log" 2>&1 </dev/null; then
	      tail -n 20 "$$log"; rm -f "$$log"
	      echo "setup: apt-get failed; install by hand: $${missing[*]}" >&2; exit 1
	    fi
	    rm -f "$$log"
	  else
	    echo "setup: missing (Debian names): $${missing[*]}" >&2
	    echo "setup: as root run: apt-get install $${missing[*]}" >&2; exit 1
	  fi
	fi
	for component in cargo rustfmt cargo-clippy; do
	  command -v "$$component" >/dev/null || {
	    echo "setup: $$component is missing: install Rust 1.90 or newer (https://rustup.rs) with rustfmt and clippy" >&2; exit 1; }
	done

root:
	@if [ "$$(id -u)" != 0 ]; then
	  echo "Network namespaces, TUN devices and nftables need root: run it again with sudo, or in a virtual machine." >&2
	  exit 1
	fi
	if [ ! -c /dev/net/tun ]; then
	  mkdir -p /dev/net && mknod /dev/net/tun c 10 200 && chmod 0666 /dev/net/tun ||
	    { echo "/dev/net/tun is missing: modprobe tun" >&2; exit 1; }
	fi
	unshare --net true || { echo "This kernel or container refuses network namespaces: unshare --net failed." >&2; exit 1; }

demo: setup root ## shows three clusters, pods, rotation, revocation; Ctrl-C ends it, DEMO_EXIT=1 ends it by itself
	@$(CARGO) build --locked --release --workspace --bins
	$(CARGO) run --locked --release -q -p mesh-e2e --bin demo

test: setup root fmt-check lint doc build unit sim audit ## proves it: formats, lints, docs, unit, property and end-to-end tests
	@echo "make test: all passed"

bench: setup root bench-rivals ## measures the data plane, its rivals and the bare link (1 hour and more, on a quiet machine)
	@$(CARGO) build --locked --release --workspace --bins
	$(TARGET)/release/bench run --dir "$(TARGET)/bench" $(BENCH)

bench-quick: root ## the same in one short round, with what is installed: for a first look
	@$(CARGO) build --locked --release --workspace --bins
	$(TARGET)/release/bench run --dir "$(TARGET)/bench" --quick $(BENCH)

bench-rotation: setup root ## counts packets while every key rotates: 2, 5 and 50 nodes, full load and one packet a second (ROTATION)
	@$(CARGO) build --locked --release --workspace --bins
	$(TARGET)/release/bench_rotation $(ROTATION)

bench-rivals:
	@dir="$(TARGET)/bench/rivals"
	mkdir -p "$$dir"
	for rival in $(RIVAL_PACKAGES); do
	  command -v "$${rival%%:*}" >/dev/null && continue
	  echo "bench: installing $${rival##*:}"
	  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${rival##*:}" >"$$dir/apt.log" 2>&1 </dev/null ||
	    echo "bench: $${rival##*:} cannot be had (see $$dir/apt.log): left out"
	done
	for rival in $(RIVAL_CRATES); do
	  [ -x "$$dir/bin/$${rival%%:*}" ] && continue
	  echo "bench: building $${rival##*:}"
	  CARGO_TARGET_DIR="$$dir/build" $(CARGO) install --locked -q --root "$$dir" "$${rival##*:}" ||
	    echo "bench: $${rival##*:} cannot be had: left out"
	done

fmt: ## formats
	@$(CARGO) fmt --all
	for manifest in $(APART); do $(CARGO) fmt --manifest-path "$$manifest"; done

fmt-check:
	@echo "== format"
	$(CARGO) fmt --all --check
	for manifest in $(APART); do $(CARGO) fmt --manifest-path "$$manifest" --check; done

lint: ## clippy, warnings are errors
	@echo "== lint"
	$(CARGO) clippy --locked -q --workspace --all-targets -- -D warnings

doc: ## documentation, warnings are errors
	@echo "== documentation"
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked -q --workspace --no-deps

build:
	@echo "== build"
	$(CARGO) build --locked -q --workspace --bins

unit:
	@echo "== tests"
	$(CARGO) test --locked --workspace --no-fail-fast

# Many data planes with a virtual clock. A workspace of its own: its boringtun reads a mock clock, and cargo would give that
# clock to every program built in the same invocation.
sim: ## simulated data planes, virtual time
	@echo "== simulation"
	$(CARGO) clippy --locked -q --manifest-path $(SIM) --target-dir "$(TARGET)" --all-targets -- -D warnings
	$(CARGO) test --locked -q --no-fail-fast --manifest-path $(SIM) --target-dir "$(TARGET)"

scale: ## a revocation and a thousand sessions; prints how long each took to confirm
	@$(CARGO) test --locked --release -q -p keyserver --test keyserver -- --ignored --nocapture thousand

audit: ## licences, sources and bans (always, in the tests); advisories where cargo-deny and its database are to be had
	@echo "== audit"
	if ! command -v cargo-deny >/dev/null; then
	  echo "audit: ADVISORIES NOT CHECKED: cargo-deny is not installed (cargo install --locked cargo-deny)"
	elif ! $(CARGO) deny --locked fetch db >/dev/null 2>&1; then
	  echo "audit: ADVISORIES NOT CHECKED: the advisory database cannot be fetched"
	  $(CARGO) deny --locked check bans licenses sources
	else
	  $(CARGO) deny --locked check
	fi

SOAK_SECONDS ?= 1800
soak: setup root ## half an hour of mixed traffic, keys rotating each minute (SOAK_SECONDS)
	@$(CARGO) build --locked --release -q --workspace --bins
	MESH_SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --locked --release -q -p mesh-e2e --test soak -- --nocapture

flood: setup root ## a minute each of 100,000 forged handshakes a second, from made-up sources and from one; prints what others felt
	@MESH_FLOOD_SECONDS=60 $(CARGO) test --locked --release -p mesh-dataplane --test flood -- --nocapture --test-threads=1

systemd: setup root ## the units on two machines with a systemd of their own; in the tests too, where the kernel allows it
	@$(CARGO) build --locked -q --workspace --bins
	MESH_SYSTEMD=1 $(CARGO) test --locked -p mesh-e2e --test systemd

# The tests themselves skip by name what is not there.
interop: setup root bench-rivals ## mesh-wg beside wireguard-go, boringtun, gotatun and a kernel's WireGuard in a virtual machine
	@missing=()
	for tool in qemu-system-x86_64:qemu-system-x86 cpio:cpio xz:xz-utils depmod:kmod; do
	  command -v "$${tool%%:*}" >/dev/null || missing+=("$${tool##*:}")
	done
	if [ $${#missing[@]} -gt 0 ]; then
	  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${missing[@]}" >/dev/null </dev/null ||
	    echo "interop: missing (Debian names): $${missing[*]}" >&2
	fi
	wg/tests/vm-prepare "$(TARGET)/interop/vm" || echo "interop: no virtual machine" >&2
	MESH_WG_REKEY=1 $(CARGO) test --locked -p mesh-wg --test interop --test kernel -- --nocapture

fuzz: ## each fuzz target for FUZZ_SECONDS (needs nightly and cargo-fuzz)
	@for crate in protocol dataplane wg; do
	  [ -d "$$crate/fuzz" ] || continue
	  ( cd "$$crate"
	    for target in $$($(CARGO) +nightly fuzz list); do
	      echo "== fuzz $$crate/$$target"
	      $(CARGO) +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=512
	    done )
	done

install: ## builds and installs programs, units and commented configuration (PREFIX, DESTDIR); overwrites no configuration
	@$(CARGO) build --locked --release --workspace --bins
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(CNI_BIN_DIR)" "$(DESTDIR)$(UNIT_DIR)" \
	  "$(DESTDIR)/etc/mesh" "$(DESTDIR)/etc/cni/net.d" "$(DESTDIR)/usr/lib/sysusers.d"
	install -d -m 0700 "$(DESTDIR)/etc/mesh-keyserver"
	install -m 0755 $(addprefix $(TARGET)/release/,meshd meshctl keyserver mesh-wg) "$(DESTDIR)$(PREFIX)/bin/"
	install -m 0755 $(TARGET)/release/mesh-cni "$(DESTDIR)$(CNI_BIN_DIR)/"
	man="$(DESTDIR)$(PREFIX)/share/man/man1"; completions="$(DESTDIR)$(PREFIX)/share/bash-completion/completions"
	install -d "$$man" "$$completions"
	$(TARGET)/release/meshctl man --dir "$$man" >/dev/null
	for program in meshd keyserver; do $(TARGET)/release/$$program man >"$$man/$$program.1"; done
	$(TARGET)/release/mesh-wg --man >"$$man/mesh-wg.1"
	$(TARGET)/release/mesh-wg --completion bash >"$$completions/mesh-wg"
	for program in meshd keyserver meshctl; do $(TARGET)/release/$$program completion bash >"$$completions/$$program"; done
	for unit in configs/*.service; do
	  sed 's|/usr/local/bin/|$(PREFIX)/bin/|' "$$unit" >"$(DESTDIR)$(UNIT_DIR)/$${unit##*/}"
	done
	install -m 0644 configs/mesh.sysusers "$(DESTDIR)/usr/lib/sysusers.d/mesh.conf"
	[ -e "$(DESTDIR)/etc/mesh/meshd.toml" ] || install -m 0644 configs/meshd.toml "$(DESTDIR)/etc/mesh/meshd.toml"
	install -m 0644 configs/10-mesh.conflist "$(DESTDIR)/etc/mesh/10-mesh.conflist"
	echo "installed below $(DESTDIR)$(PREFIX); next: README.md, 'An on-prem machine by hand'"
