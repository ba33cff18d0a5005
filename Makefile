# The thin door to Ferry. `make demo` and `make test` set up what they need first and say what they install.

CARGO ?= cargo

FUZZ_SECONDS ?= 30

.PHONY: demo test test-nested fuzz check fmt images bench report setup build clean

build: setup            ## the ferry command, optimised, at target/release/ferry
	$(CARGO) build --release -p ferry

demo: setup             ## run the main job and show it working
	$(CARGO) build --release -p ferry
	scripts/demo target/release/ferry

test: setup images      ## all tests; FERRY_PULSES, FERRY_SEEDS, FERRY_CROSSINGS ask for longer runs, FERRY_DIRTY_RING=ENTRIES for rings in the soak
	$(CARGO) test --workspace

test-nested: setup images ## only the tests with stock Linux guests under nested KVM, for longer than in `make test`
	FERRY_NESTED_FULL=1 $(CARGO) test -p ferry-tests --test e2e nested

fuzz: setup             ## feed every parser of hostile input; FUZZ_SECONDS for each target, FUZZ_TARGETS for some of them
	FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/fuzz $(FUZZ_TARGETS)

check: setup            ## formatting, lints, licences and sources of dependencies, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	cd images/builtin && $(CARGO) fmt --check && $(CARGO) clippy --release --locked --target-dir ../../target/guest -- -D warnings
	scripts/deny
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

images: setup           ## a stock Linux kernel, initramfs and disk for guests, in images/linux/cache
	images/linux/make-all

bench: setup            ## measurements against peers; results are printed and written to target/bench
	$(CARGO) build --release -p ferry
	scripts/bench

setup:
	@scripts/setup

clean:
	$(CARGO) clean
	rm -rf images/linux/cache
