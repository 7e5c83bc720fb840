# make train   set up .venv, make the demo data set, train, evaluate, predict a held-out day and draw it
# make test    set up .venv and run the linter, the type checker and the tests
# make chaos   kill, cut, fill and hang everything that can be, and print what survived; some minutes
# make gpu-bench   on a machine with a GPU, in at most 8 minutes: the kernels' rates and what limits them, into
#                  benchmarks/results/<device>/ and docs/measured.md, and their tests there; sets up nothing, PYTHON is any that has torch,
#                  Triton, pytest-xdist, hypothesis, matplotlib and tqdm; ncu, NVIDIA's profiler, has to be on the PATH
#                  or in /usr/local/cuda/bin
#
#   PYTHON=python3.12   the interpreter that .venv is made with: 3.10 to 3.13
#   WORKLOAD=fluid      what `make train` trains: fluid, causal_lm, image_classification, seq2seq or token_image;
#                       its configuration is configs/$(WORKLOAD)/demo.json
#
# After the first call nothing is downloaded and no finished data set is made again.

PYTHON ?= python3
WORKLOAD ?= fluid
VENV ?= .venv

WORKLOADS := $(patsubst models/%/task.py,%,$(wildcard models/*/task.py))
ifeq ($(filter $(WORKLOAD),$(WORKLOADS)),)
$(error WORKLOAD=$(WORKLOAD) is none of: $(WORKLOADS))
endif

python := $(VENV)/bin/python
# DeepSpeed compiles nothing at installation; its build finds setuptools in .venv, so nothing unpinned is fetched
install := DS_BUILD_OPS=0 $(python) -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation
run := runs/$(WORKLOAD)-demo

.PHONY: train test chaos lint install clean
.DELETE_ON_ERROR:

train: train-$(WORKLOAD)

# fluid: days of a simulated gas network, a surrogate of it, first of the next minute and then of rollouts, what else one
# would try, and a day that the surrogate has not seen
csv := data/fluid-demo/csv
store := data/fluid-demo/store
cases := 120
test_cases := 8
simulated := $(csv)/.simulated-$(cases)-$(test_cases)
unseen := $(csv)/test/case_0001

# one process and one thread: a step of so small a network is no quicker on two ranks or two threads
train_days = OMP_NUM_THREADS=1 $(python) launchers/train.py --resume auto --config configs/fluid

.PHONY: train-fluid
train-fluid: $(store)/store.json
	$(train_days)/demo.json --output-dir $(run)/minute
	$(train_days)/demo-rollout.json --output-dir $(run)/rollout
	$(python) launchers/evaluate.py --run $(run)/rollout --baselines persistence ridge switches mlp
	$(python) launchers/predict.py --run $(run)/rollout --case $(unseen) --out $(run)/rollout/prediction
	@echo; echo "Training: $(run)/rollout/report/summary.md   evaluation: $(run)/rollout/evaluation/"
	@echo "A day that was not trained on, predicted from its first minutes and its boundary conditions:"
	@ls $(run)/rollout/prediction/*.png

$(simulated): | $(VENV)/.installed
	$(python) launchers/prepare.py fluid --simulate demo --cases $(cases) --test-cases $(test_cases) --out $(csv)
	@touch $@

$(store)/store.json: $(simulated)
	$(python) launchers/prepare.py fluid --source $(csv) --out $(store)
	@touch $@

# causal_lm: the documentation of Python, then questions and answers, then preferences among answers
lm := data/causal_lm-demo
question := How are you?
train_lm = $(VENV)/bin/deepspeed --num_gpus 2 launchers/train.py --resume auto --config configs/causal_lm

.PHONY: train-causal_lm
train-causal_lm: $(lm)/text $(lm)/conversations $(lm)/preferences
	$(train_lm)/demo.json --output-dir $(run)/pretrain
	$(train_lm)/demo-sft.json --output-dir $(run)/sft
	$(train_lm)/demo-dpo.json --output-dir $(run)/dpo
	@for stage in pretrain sft dpo; do \
		echo; echo "$$stage, on data that it was not trained on:"; \
		$(python) launchers/evaluate.py --run $(run)/$$stage || exit 1; \
	done
	@echo; echo "A question that it was not trained on, from $(lm)/example/conversations-val.jsonl:"
	$(python) launchers/predict.py --run $(run)/dpo --chat --max-new-tokens 48 --prompt "$(question)"
	@echo; echo "Talk to it: $(python) launchers/predict.py --run $(run)/dpo --chat"
	@ls $(run)/*/evaluation/*.png

$(lm)/text: | $(VENV)/.installed
	$(python) launchers/prepare.py causal_lm --example --kind text --train-tokenizer --vocab-size 4096 --out $@

$(lm)/conversations $(lm)/preferences: $(lm)/%: | $(lm)/text
	$(python) launchers/prepare.py causal_lm --example --kind $* --tokenizer $(lm)/text/tokenizer --out $@

# image_classification: handwritten digits, a small network, and simple classifiers on the same held-out images
digits := data/image_classification-demo

.PHONY: train-image_classification
train-image_classification: $(digits)/store
	$(VENV)/bin/deepspeed --num_gpus 2 launchers/train.py --config configs/image_classification/demo.json \
		--output-dir $(run) --resume auto
	$(python) launchers/evaluate.py --run $(run)
	$(python) launchers/predict.py --run $(run) --images $(digits)/images/test --out $(run)/prediction
	@echo; echo "Training: $(run)/report/summary.md   evaluation: $(run)/evaluation/"
	@echo "Digits that were not trained on, and what they were taken for:"
	@ls $(run)/prediction/*

$(digits)/images: | $(VENV)/.installed
	$(python) launchers/prepare.py image_classification --example digits --out $@

$(digits)/store: | $(digits)/images
	$(python) launchers/prepare.py image_classification --source $| --out $@ --img-size 48

# seq2seq: spelled-out numbers in eight languages; then Swedish, by the whole network, by its decoder, and by a new one
spelled := data/seq2seq-demo
# one process and two threads: quicker than two ranks
train_numbers = OMP_NUM_THREADS=2 $(python) launchers/train.py --resume auto --config configs/seq2seq
prepare_numbers = $(python) launchers/prepare.py seq2seq --source $(spelled)/numbers/$(1)train.jsonl \
	--val-source $(spelled)/numbers/$(1)val.jsonl --test-source $(spelled)/numbers/$(1)test.jsonl --out $@

.PHONY: train-seq2seq
train-seq2seq: $(spelled)/pairs $(spelled)/sv
	$(train_numbers)/demo.json --output-dir $(run)/pretrained
	$(train_numbers)/demo-sv.json --output-dir $(run)/sv
	$(train_numbers)/demo-sv.json --output-dir $(run)/sv-frozen \
		--set 'training.parameters=[{"names": ["lm.shared.*", "lm.encoder.*"], "frozen": true}]' \
		--set deepspeed.optimizer.params.lr=0.05
	$(train_numbers)/demo-sv.json --output-dir $(run)/sv-scratch \
		--set model.path=null --set model.preset=tiny --set model.dropout=0
	$(python) launchers/bench.py numbers --example $(spelled)/numbers --runs $(run)
	@echo; echo "Ask it: $(python) launchers/predict.py --run $(run)/pretrained --prompt \"dreiundvirzig\""

$(spelled)/numbers: | $(VENV)/.installed
	$(python) launchers/prepare.py seq2seq --example numbers --out $@

$(spelled)/pairs: | $(spelled)/numbers
	$(call prepare_numbers) --train-tokenizer --vocab-size 512 --max-token-length 12

$(spelled)/sv: | $(spelled)/pairs
	$(call prepare_numbers,sv-) --tokenizer $(spelled)/pairs/tokenizer

# token_image: the documentation of Python as images of 16 x 16 bytes, from noise
pages := data/token_image-demo

.PHONY: train-token_image
train-token_image: $(pages)/store
	$(VENV)/bin/deepspeed --num_gpus 2 launchers/train.py --config configs/token_image/demo.json \
		--output-dir $(run) --resume auto
	$(python) launchers/evaluate.py --run $(run) --split test
	$(python) launchers/predict.py --run $(run) --samples 4 --out $(run)/samples
	@echo; echo "Training: $(run)/report/summary.md   evaluation: $(run)/evaluation/   samples: $(run)/samples"
	@ls $(run)/evaluation/*.png

$(pages)/topics: | $(VENV)/.installed
	$(python) launchers/prepare.py token_image --example topics --out $@

$(pages)/store: | $(pages)/topics
	$(python) launchers/prepare.py token_image --source $(pages)/topics/train.jsonl --byte-tokenizer \
		--val-source $(pages)/topics/val.jsonl --test-source $(pages)/topics/test.jsonl --out $@

# worksteal: each worker begins with half of the files, so that what the tests of a file share is made once
test: lint
	$(python) -m pytest -n 2 --dist worksteal

chaos: $(VENV)/.installed-test
	$(python) -m pytest -n 2 --dist worksteal -m fault

lint: $(VENV)/.installed-test
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

# Time on a GPU is dear: 475 seconds at most, kills included. A part begins nothing more after its --minutes, is stopped by
# `timeout` if what it has begun takes too long, and stops no other by failing; what it has measured by then is written.
# The tests, those of the sizes that matter first, are named as they end, and interrupted as if by hand; pytest-xdist then
# waits 10 seconds for its workers before it says what passed and what failed. Those that take most of a GPU's memory
# come after, one by one.
first_tests := tests/kernels/attention/test_flash_gpu.py
gpu_tests := $(first_tests) $(filter-out $(first_tests),$(wildcard tests/kernels/attention/test_*.py tests/kernels/test_*.py))
in_order := -n logical --maxprocesses 12 --dist load --maxschedchunk 1

.PHONY: gpu-bench
gpu-bench:
	@status=0; export PYTHONPATH=.; \
	timeout -k 8 66 $(PYTHON) launchers/bench.py masked_mse --minutes 0.7 --out benchmarks/results || status=1; \
	timeout -k 8 150 $(PYTHON) launchers/bench.py attention --minutes 2.0 --out benchmarks/results || status=1; \
	timeout -k 6 86 $(PYTHON) launchers/bench.py profile --minutes 1.0 --out benchmarks/results || status=1; \
	timeout -k 16 -s INT --foreground 92 $(PYTHON) -m pytest -m "gpu and not slow and not large" -vv --tb=line $(in_order) $(gpu_tests) || status=1; \
	timeout -k 2 26 $(PYTHON) -m pytest -m "gpu and large" -vv --tb=line $(gpu_tests) || status=1; \
	timeout -k 2 13 $(PYTHON) -m trunkline.benchmarks.summary --write || status=1; \
	exit $$status

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) data/*-demo runs/*-demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: setup.py constraints.txt | $(python)
	$(install) setuptools wheel
	$(install) -e ".[examples]"
	@touch $@

# the extra "test" has "examples" in it
$(VENV)/.installed-test: setup.py constraints.txt | $(python)
	$(install) setuptools wheel
	$(install) -e ".[test]"
	@touch $(VENV)/.installed $@
