# make demo   fetch a model and data, fit, fine-tune, show recommendations   (MINUTES=5)
# make docs   the guide, into site/
# make test   everything that needs no network once installed
PY ?= python3.11
MINUTES ?= 5
BIN := .venv/bin

.PHONY: demo test test-full test-engines lint docs wheel clean
.DEFAULT_GOAL := test

.venv: .venv/.installed
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PY) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[all,dev]" --constraint constraints.txt
	touch $@

demo: .venv/.installed
	$(BIN)/python eval/demo.py --minutes $(MINUTES)

# Two processes of one thread each: small models gain nothing from more threads.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not full"

test-full: .venv/.installed
	$(BIN)/python -m pytest

# Installs vLLM into runs/engines and compares its scores with ours.
test-engines: .venv/.installed
	$(BIN)/python -c "import sys; sys.path.insert(0, 'eval'); import engine; engine.environment()"
	LLMREC_ENGINES=1 $(BIN)/python -m pytest tests/test_remote.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m mkdocs build --strict --quiet

wheel: .venv/.installed
	$(BIN)/python -m build --wheel --outdir dist --no-isolation

clean:
	rm -rf .venv dist build site
