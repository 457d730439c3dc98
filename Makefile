# make demo    install what the demo needs into .venv, then fine-tune the embedded model
# make test    set up, then run the tests (those of pages need a Chromium, and are skipped where there is none)
# make test-slow  set up, then run the longer tests, the further cases of others, and properties on ten times the examples
# make check   set up, then check format, lint, types, the rules of the source, and the links of the documentation
# make docs    set up, then build the documentation's site in build/site, without broken links
# make bench   set up, including the libraries to compare with, then run the benchmarks
# make scale   set up, then run the commands once on a million rows, 100,000 steps and 100 runs (twenty minutes on busy cores)
# make house   set up, then print figures about the code, such as circles of imports and shared class names
# make golden  set up, then write the texts that users see (--help, errors) to tests/golden, and what the commands of
#              docs/rollouts.md print into that page, so that diffs show changes
# make parity  set up, then compare renderers with published templates and tokenizers, and write the table and
#              docs/templates.md
#              (COOKBOOK_TOKENIZERS is the folder of the tokenizers, with that of the templates beside it)
# make peers   make the environments of other packages' renderers, for make parity to compare with
# make families  set up, then try the tiny model of each family of chat models, and write docs/models.md
# make gpu     set up, then run tests, comparisons and measurements that need a GPU (ten minutes at most), into runs/gpu
# make rehearsal  set up, then run the CUDA branches of every family on the fake CUDA device
# make roofline  set up, then derive what a step and a token cost on GPUs, without one, and write tests/golden/roofline.txt
# make tinker  make an environment with the Tinker SDK and tinker-cookbook, then run 43 of its programs to their ends
#              on this project
PYTHON ?= python3
BIN := .venv/bin
BASE_STAMP := .venv/.is-installed
STAMP := .venv/.is-set-up
BENCH_STAMP := .venv/.is-set-up-to-bench

.PHONY: setup demo test test-slow check docs format bench scale house parity peers tinker families golden roofline rehearsal gpu clean

setup: $(STAMP)

# What running needs, without the extras. --no-compile: Python compiles a module when it is first imported, and most never are.
$(BASE_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@echo "Installs sft-cookbook into .venv: torch, transformers, peft, datasets and what they need, and no extras."
	@echo "With a CPU build of torch that is 1.2 GB; CUDA builds, which the index has for Linux, are several times as large."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable .
	@touch $@

$(STAMP): $(BASE_STAMP)
	@echo "Installs the extras and the tools of the tests into .venv: Ray, lm-eval, Inspect AI, bitsandbytes and others, 1.2 GB more."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(BASE_STAMP)
	@echo "Fine-tunes the embedded model (2 million weights) on 1,600 chats in pirate dialect. Everything goes to runs/demo."
	$(BIN)/python -m recipes.sft log_path=runs/demo if_log_path_exists=delete
	@echo "Its page is runs/demo/report.html. To talk to it: $(BIN)/python -m recipes.chat checkpoint=runs/demo"

# Two processes with one thread each, since tests spend much of their time waiting for other processes.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not published" --timeout 900 --ignore tests/cuda_rehearsal --numprocesses 2
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m "hypothesis and not slow and not published" --timeout 900

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m '' tests/test_encodings.py tests/test_house.py \
		tests/test_import_direction.py tests/test_one_way_to_write.py tests/test_printing.py
	$(MAKE) --no-print-directory docs

docs: setup
	PYTHONPATH=. $(BIN)/python docs/assemble.py
	$(BIN)/zensical build --strict

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $(BENCH_STAMP)

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.train_step --set mixed
	$(BIN)/python -m benchmarks.cost_of_size
	$(BIN)/python -m benchmarks.loop_overhead
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.hybrids
	$(BIN)/python -m benchmarks.expert_lora
	$(BIN)/python -m benchmarks.rendering
	$(BIN)/python -m benchmarks.long_conversations
	$(BIN)/python -m benchmarks.data_pipeline
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.watching
	$(BIN)/python -m benchmarks.server_overhead
	$(BIN)/python -m benchmarks.several_adapters

scale: setup
	$(BIN)/python -m benchmarks.scale

house: setup
	$(BIN)/python -m benchmarks.house

parity: setup
	$(BIN)/python -m pytest -m "published and not slow" --timeout 900
	PYTHONPATH=tests/helpers $(BIN)/python tests/renderers/parity.py --write
	PYTHONPATH=tests/helpers $(BIN)/python tests/renderers/templates_page.py --write

# the environments of other packages' renderers, which make parity compares with (tml-renderers, which
# tinker-cookbook names, is not on the index, so its dependencies are given here)
peers: .venv-peers-renderers/.is-set-up .venv-peers-tinker-cookbook/.is-set-up

.venv-peers-renderers/.is-set-up:
	$(PYTHON) -m venv .venv-peers-renderers
	.venv-peers-renderers/bin/python -m pip install --quiet --disable-pip-version-check 'renderers[transformers]==0.1.12' httpx
	touch $@

.venv-peers-tinker-cookbook/.is-set-up:
	$(PYTHON) -m venv .venv-peers-tinker-cookbook
	.venv-peers-tinker-cookbook/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'tinker-cookbook==0.6.1'
	.venv-peers-tinker-cookbook/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers tinker pillow
	touch $@

# the environment in which programs of tinker-cookbook are run as they are; what they compute in their first steps is compared
.venv-tinker/.is-set-up:
	$(PYTHON) -m venv .venv-tinker
	.venv-tinker/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'tinker-cookbook==0.6.1'
	.venv-tinker/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tinker]' \
		'tinker==0.38.0' 'openai>=2' aiohttp blobfile cloudpickle termcolor tiktoken pillow h2 math-verify pylatexenc
	touch $@

tinker: setup .venv-tinker/.is-set-up
	.venv-tinker/bin/python tests/tinker/signatures.py --check
	.venv-tinker/bin/python tests/tinker/over_http.py

families: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/helpers $(BIN)/python tests/helpers/models_page.py

# the CUDA branches of every family, on the fake device
rehearsal: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/cuda_rehearsal --timeout 1800 --numprocesses 2 --dist loadgroup

# the kernels in Triton's interpreter, and compiled for GPUs that are not there. Triton is not in the environment itself:
# torch would import it in each process
kernels: setup build/kernels/triton
	$(BIN)/python -m pytest -m "slow or not slow" tests/cookbook/engine/model/test_kernels.py

build/kernels/triton:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/kernels 'triton==3.9.0'

# everything that needs a GPU, in ten minutes at most
gpu: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

# what a step and a token cost on a CUDA device, as the fake one counts it
roofline: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.roofline --classes --model qwen3-0.6b > tests/golden/roofline.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.roofline

golden: setup
	$(BIN)/python tests/golden/texts.py
	PYTHONPATH=.:tests/helpers $(BIN)/python tests/helpers/rollouts_page.py
	PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/cookbook/engine/model/test_targets.py

clean:
	rm -rf .venv .venv-tinker .venv-peers-* build runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
