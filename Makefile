# Two commands do all set-up: `make demo` runs a live mesh on this machine, `make test` runs the core tests.
# Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
# Each mark says what the environment holds, and for which Python; a later one includes the earlier.
RUN := $(VENV)/.run-$(VERSION)
DEV := $(VENV)/.dev-$(VERSION)
BENCH := $(VENV)/.bench-$(VERSION)
COMPILED := $(VENV)/compiled
COMPILED_TESTS := tests/unit/wire tests/unit/policy tests/unit/testing tests/conformance $(addprefix tests/integration/test_, \
	balancing_mesh.py chain.py examples.py failure_detection_live.py grpc.py hedging_live.py http2_callers.py http2_upstream.py \
	http_basics.py http_bodies.py http_peers.py http_resilience.py overload_live.py reload.py sse.py \
	tcp_mesh.py traffic_shaping.py websocket.py)
SOURCES := $(shell find sidecar control_plane certs -name '*.py')

.PHONY: demo test test-full test-compiled lint compiled bench bench-control clean
.DELETE_ON_ERROR:

demo: $(RUN)
	@$(BIN)/pillion demo

test: $(DEV) lint
	$(BIN)/python -m pytest -m "not long" --numprocesses auto --maxprocesses 4 --dist loadfile

# Everything, once: the core, what takes long, and what needs the machine for itself because it looks at latencies.
test-full: test test-compiled
	$(BIN)/python -m pytest -m "long and not alone" --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m "long and alone"

# The same behaviour, compiled: codecs and decisions by their unit tests, the rest through real sidecars. (-P: or the
# sources here would be found first.)
test-compiled: $(COMPILED)/.built
	@$(COMPILED)/bin/python -P -c 'import sidecar.build_info as b; assert b.build() is b.COMPILED, b.__file__'
	$(COMPILED)/bin/python -P -m pytest -m "not (long or root)" --numprocesses auto --maxprocesses 4 --dist loadfile \
		$(COMPILED_TESTS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pillion with its data path compiled, in an environment of its own: the sources here stay what runs and is tested.
compiled: $(COMPILED)/.built
	@$(COMPILED)/bin/pillion --version

# make bench ARGS="--quick", or any other options of `python -m tests.bench --help`.
bench: $(BENCH) $(COMPILED)/.built
	$(BIN)/python -m tests.bench $(ARGS)

# The control plane with a swarm of sidecars: make bench-control ARGS="--quick".
bench-control: $(DEV)
	$(BIN)/python -m tests.bench.control $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(RUN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pillion needs Python 3.11 or later; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@rm -f $(VENV)/.run-* $(VENV)/.dev-* $(VENV)/.bench-*
	@grep -qs '^version = $(VERSION)\.' $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	@echo "installing pillion into $(VENV) …"
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install --upgrade "pip>=25.1"
	@$(PIP) install --editable .
	@touch $@

$(DEV): $(RUN)
	@echo "installing what the tests need …"
	@$(PIP) install --group dev
	@touch $@

# It shares the other's packages, all but pillion itself.
$(COMPILED)/.built: $(DEV) setup.py $(SOURCES)
	@echo "compiling the data path into $(COMPILED), which takes some minutes …"
	@rm -rf $(COMPILED)
	@$(PYTHON) -m venv --without-pip $(COMPILED)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $(COMPILED)/lib/python$(VERSION)/site-packages/shared.pth
	@PILLION_COMPILE=1 $(PIP) --python $(COMPILED)/bin/python install --no-deps --force-reinstall .
	@touch $@

$(BENCH): $(DEV)
	@echo "installing what the benchmark needs …"
	@$(PIP) install --group bench
	@# in an environment of its own: it wants older versions of what pillion uses
	@$(PYTHON) -m venv $(VENV)/mitmproxy
	@$(VENV)/mitmproxy/bin/python -m pip --quiet --disable-pip-version-check --no-input install mitmproxy
	@touch $@
