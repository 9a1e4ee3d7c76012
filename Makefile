.PHONY: app test test-fast demo docker lint clean
PYTHON ?= python3
PORT ?= 7860
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU torch's own index offers a build for CPUs, a tenth of the size. Where it is out of reach pip takes what its
# configured sources offer.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

app: $(VENV)/ready  ## the page on http://127.0.0.1:7860
	$(BIN)/python -m app --port $(PORT)

test: $(VENV)/ready-dev  ## everything; a browser must be there (Debian: apt-get install chromium)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/ready-dev  ## without what takes more than a few seconds
	$(BIN)/python -m pytest -m "not slow"

demo: $(VENV)/ready  ## train, sample, judge and compare a small pair; then open runs/demo/report.html
	$(BIN)/python -m eval.demo

docker:
	docker build --tag fading-shortcuts .
	@echo "run it: docker run --publish 7860:7860 --volume fading-shortcuts:/app/runs fading-shortcuts"

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || ! curl --fail --silent --head --max-time 5 $(TORCH_INDEX)/torch/ >/dev/null \
		|| $(BIN)/pip install --quiet --index-url $(TORCH_INDEX) torch==$(call pinned,torch) torchvision==$(call pinned,torchvision)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -m models.compat
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

pinned = $(shell sed -n 's/^$(1)==//p' requirements.txt)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
