# What a person types. Needs git, make and Python 3.11 to 3.13 with venv; nothing else is taken from the system.
#   make demo                 a whole swarm on this machine, in a few minutes
#   make test                 the fast suite
#   make check                lint, format, types
#   make test-slow SHARD=1/3  one part of the slow tests (some need root and `make system-deps`)
#   make chaos                60 faults in 100 epochs on this machine, about an hour: see docs/faults.md
#   make wheel, make release  see docs/releasing.md
# PIP_ARGS goes to every pip call: an index with CPU-only builds of torch saves gigabytes on a machine without a GPU.
# VENV=path uses another environment, PYTHON=path another interpreter, PYTEST_ARGS='-k name' another choice of tests.

VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
CHAOS_ARGS ?=
SHARDS := 3
SHARD_SECONDS := 1800
TEST_EXTRAS := ray,dev
SYSTEM_PACKAGES := faketime iproute2 iptables procps
SYSTEM_PROGRAMS := faketime ip tc iptables ps

supported = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c '$(supported)' >/dev/null 2>&1 && echo "$$p" && break; done)
BIN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all chaos check format wheel release system-deps
.DELETE_ON_ERROR:

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.has-demo
	$(BIN) -m launchers.job runs/demo.toml --fresh

test: $(VENV)/.has-test
	$(BIN) -m pytest -m "not slow" --durations 5 $(PYTEST_ARGS)

test-slow: $(VENV)/.has-test
	@case "$(SHARD)" in [1-9]*/$(SHARDS)) ;; *) echo "say which: make test-slow SHARD=k/$(SHARDS)" >&2; exit 2;; esac
	$(BIN) -m pytest -m slow --shard $(SHARD) --session-timeout $(SHARD_SECONDS) --durations 10 $(PYTEST_ARGS)

test-all: test
	for k in $$(seq $(SHARDS)); do $(MAKE) test-slow SHARD=$$k/$(SHARDS) || exit 1; done

# CHAOS_ARGS='--stock --seed 2': bare hivemind beside it, another schedule.
chaos: $(VENV)/.has-test
	$(BIN) -W ignore -m benchmarks.chaos $(CHAOS_ARGS)

check: $(VENV)/.has-test
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: $(VENV)/.has-test
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

wheel: $(VENV)/.has-test
	rm -rf dist
	$(BIN) -m hatchling build -t wheel
	$(BIN) -m pip hash dist/*.whl

# Builds and checks, never uploads: see docs/releasing.md for what a person does with the result.
release: $(VENV)/.has-release
	@test -z "$$(git status --porcelain)" || { echo "release: commit or remove what git status shows first" >&2; exit 1; }
	@version=$$($(BIN) -m hatchling version) && grep -q "^## \[$$version\] - " CHANGELOG.md || \
		{ echo "release: CHANGELOG.md has no section '## [$$version] - date'" >&2; exit 1; }
	rm -rf dist
	$(BIN) -m build --no-isolation
	$(BIN) -m twine check --strict dist/*
	rm -rf dist/.try && $(PYTHON) -m venv dist/.try
	dist/.try/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt dist/*.whl
	cd dist/.try && bin/calm-ray --help >/dev/null && bin/python -m pip check
	rm -rf dist/.try
	@version=$$($(BIN) -m hatchling version) && $(BIN) -m pip hash dist/* && printf '%s\n' \
		"" "Built and checked, nothing was sent. Next, by hand (docs/releasing.md):" \
		"  git tag -s v$$version -m 'calm-ray $$version' && git push origin v$$version" \
		"  $(BIN) -m twine upload dist/*" "  put the SHA-256 of the wheel into the release's notes"

# For slow tests: network namespaces, firewalls. Does nothing where the programs are there already.
system-deps:
	@missing=; for p in $(SYSTEM_PROGRAMS); do PATH=$$PATH:/usr/sbin:/sbin command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	test -z "$$missing" && exit 0; echo "missing:$$missing"; \
	command -v apt-get >/dev/null || { echo "install them yourself (Debian's packages: $(SYSTEM_PACKAGES))" >&2; exit 1; }; \
	sudo=; test "$$(id -u)" = 0 || sudo=sudo; \
	$$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES)

# One environment, filled as far as a target needs it. Made again only when a version or a requirement changes.
define install
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found (Debian: apt install python3-venv); or say PYTHON=path" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(1)]'
	@touch $(2)
endef

$(VENV)/.has-demo: pyproject.toml constraints.txt
	$(call install,ray,$@)

$(VENV)/.has-test: pyproject.toml constraints.txt
	$(call install,$(TEST_EXTRAS),$(VENV)/.has-demo $@)

$(VENV)/.has-release: pyproject.toml constraints.txt
	$(call install,release,$@)
