.PHONY: app test test-fast coverage demo docker lock audit clean
PYTHON ?= python3
PORT ?= 7860
VENV := .venv
BIN := $(VENV)/bin
# Two workers take a file at a time, in the order that tests/conftest.py gives them.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
# Without an NVIDIA GPU torch's own index offers a build for CPUs, a tenth of the size. Where it is out of reach pip takes what its
# configured sources offer.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

app: $(VENV)/ready  ## the page on http://127.0.0.1:7860
	$(BIN)/python -m app --port $(PORT)

test: $(VENV)/ready-dev  ## everything; a browser must be there (Debian: apt-get install chromium)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED)

test-fast: $(VENV)/ready-dev  ## without what takes more than a few seconds
	$(BIN)/python -m pytest -m "not slow"

coverage: $(VENV)/ready-dev  ## every test, and the share of lines that ran; scripts and pages run as processes of their own, which count too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) --cov --cov-report=term

demo: $(VENV)/ready  ## train, sample, judge and compare a small pair; then open runs/demo/report.html
	$(BIN)/python -m eval.demo

docker:
	docker build --tag fading-shortcuts .
	@docker image ls fading-shortcuts
	@echo "run it: docker run --publish 7860:7860 --volume fading-shortcuts:/app/runs fading-shortcuts"

lock: $(VENV)/ready-dev  ## remake requirements.lock after a change of requirements.txt; with UPGRADE=--upgrade all that it needs anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" $(UPGRADE) \
		--output-file requirements.lock requirements.txt
	awk '/^[a-z]/ { keep = !/^(torch|torchvision|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==/ } keep || /^#/' requirements.lock > .lock.partial
	mv .lock.partial requirements.lock

audit: $(VENV)/ready-dev  ## known vulnerabilities of what is locked; asks the package index
	$(BIN)/uvx pip-audit==2.10.1 --strict --disable-pip --require-hashes --requirement requirements.lock

$(VENV)/ready: requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	command -v nvidia-smi >/dev/null || ! curl --fail --silent --head --max-time 5 $(TORCH_INDEX)/torch/ >/dev/null \
		|| $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -c "from models.compat import install; install()"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

TORCH = $(shell grep -E '^torch(vision)?==' requirements.txt)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
