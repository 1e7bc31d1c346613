# Everything runs in .venv, made once. `make demo` and `make test` need nothing but Python 3.10 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python
QUICK := $(addprefix tests/test_,$(addsuffix .py,imports head head_options head_inference losses metrics factory published \
	data_formats flags flag_effects))

.PHONY: demo quick test test-slow models clean

demo: .venv/demo  ## compare heads on embedded images, print the tables, write demo_output/demo.png and report/
	$(RUN) -m benchmarks.demo

test: .venv/ready  ## linter, types and the fast suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m 'not slow'

quick: .venv/ready  ## the core: head, models, losses, metrics, flags, formats
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m 'not slow' $(QUICK)

test-slow: .venv/ready  ## the long sweeps: every timm model, the soak of kills
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m slow

models: .venv/ready  ## write docs/models.md anew
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.survey --write

.venv/demo: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

.venv/ready: .venv/demo
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv demo_output output
