# make quickstart       profile, search, plot and export the checkpoint in examples/ (installs only what lexi_search needs)
# make serve-demo       serve the exported folder with vLLM
# make test             every test, with a real vLLM engine
# make test-newest-jax  profiles by the newest JAX on the Pythons in JAX_PYTHONS, which are to be installed
#
# Each target makes its own environment. DEVICE is cpu or cuda; by default cuda where an NVIDIA driver answers.

PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
SEARCH := .venv
SERVE := .venv-serve
OUT := quickstart
JOBS ?= 2
JAX_PYTHONS ?= python3.12 python3.13
CHECKPOINT := examples/tiny-olmoe

export VLLM_NO_USAGE_STATS := 1
export VLLM_CPU_KVCACHE_SPACE ?= 1

.PHONY: quickstart serve-demo test test-newest-jax lint clean

quickstart: $(SEARCH)/installed
	mkdir -p $(OUT)
	$(SEARCH)/bin/lexi-search profile $(CHECKPOINT) --compensation none -o $(OUT)/profile.json
	$(SEARCH)/bin/lexi-search search $(OUT)/profile.json --budgets 16:64:8 -o $(OUT)/allocations
	$(SEARCH)/bin/lexi-search plot $(OUT)/profile.json -o $(OUT)/heatmap.png
	$(SEARCH)/bin/lexi-search front $(OUT)/profile.json -o $(OUT)/front.png -o $(OUT)/front.csv >$(OUT)/front.txt
	$(SEARCH)/bin/lexi-search export $(OUT)/allocations/allocation-40.json --to vllm --model $(CHECKPOINT) \
		-o $(OUT)/tiny-olmoe-40 --force

serve-demo: quickstart $(SERVE)/installed
	HF_HUB_OFFLINE=1 $(SERVE)/bin/python examples/serve_demo.py $(OUT)/tiny-olmoe-40

test: $(SERVE)/installed
	$(SERVE)/bin/python -m pytest -n $(JOBS) --dist loadfile

test-newest-jax: $(SERVE)/installed
	for python in $(JAX_PYTHONS); do $$python -m venv .venv-jax-$$(basename $$python) \
		&& .venv-jax-$$(basename $$python)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e . \
		|| exit 1; done
	LEXI_JAX_PYTHONS="$(foreach python,$(JAX_PYTHONS),$(CURDIR)/.venv-jax-$(notdir $(python))/bin/python)" \
		$(SERVE)/bin/python -m pytest tests/search/profiling/test_newest_jax.py

lint: $(SERVE)/installed
	$(SERVE)/bin/ruff check .

$(SEARCH)/installed: pyproject.toml
	$(PYTHON) -m venv $(SEARCH)
	$(SEARCH)/bin/python -m pip install -q $(if $(filter cuda,$(DEVICE)),-e '.[cuda]',-e .)
	touch $@

# The CPU wheel of vLLM wants PyTorch's CPU build, which lies on PyTorch's own index unless pip is set up to find it
# elsewhere; and it pulls in companions of PyTorch that are built for CUDA: with them transformers or vLLM itself cannot
# be imported, without them both can.
$(SERVE)/installed: pyproject.toml
	$(PYTHON) -m venv $(SERVE)
ifeq ($(DEVICE),cuda)
	$(SERVE)/bin/python -m pip install -q -e '.[serve,eval,dev]'
else
	$(SERVE)/bin/python -m pip install -q 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(SERVE)/bin/python -m pip install -q --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	$(SERVE)/bin/python -m pip install -q -e '.[serve-cpu,eval,dev]'
	$(SERVE)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@

clean:
	rm -rf $(SEARCH) $(SERVE) $(OUT)
