# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-all lint format bench bench-gpu serve check clean

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "attnzoo needs Python 3.11 or newer (python3 was not found)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "attnzoo needs Python 3.11 or newer, $(PYTHON) is older" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		echo "no venv module: installing Debian's python3-venv"; apt-get update -qq && apt-get install -y -qq python3-venv; \
		rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed          ## the main job on the embedded models; ends with the path of outputs/index.html
	$(BIN)/attnzoo demo --out outputs

test: $(VENV)/.installed          ## the suite CI runs
	$(PYTEST) -q -m "not slow"

test-all: $(VENV)/.installed      ## and the long sweep
	$(PYTEST) -q
	$(BIN)/python -m attnzoo.kernels.aot --all
	$(BIN)/attnzoo check miniatures

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed         ## ratios against a named peer, on this CPU
	$(BIN)/attnzoo bench

bench-gpu: $(VENV)/.installed     ## checks, a tuned table of tiles, times, a plot in outputs/gpu; backbones; needs a GPU
	$(BIN)/python -m benchmarks.gpu --out outputs/gpu --tune-out outputs/gpu/neighborhood_attention.json
	$(BIN)/python -m benchmarks.gpu_backbones --out outputs/gpu_backbones

serve: $(VENV)/.installed         ## the Gradio app on 127.0.0.1
	$(BIN)/attnzoo serve

check: $(VENV)/.installed         ## the shipped models against their bars
	$(BIN)/attnzoo check miniatures

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
