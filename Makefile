# The only commands anyone has to remember. Each makes what it needs first, on a fresh machine too.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs bench claims gpu gpu-rehearsal clean

demo: .venv/ready  ## train both stages on composed scenes, in half an hour to an hour on two cores, and write runs/demo/report.html
	$(BIN)/blip2 demo

# The bytecode that one run compiles saves time in the next one.
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/ready  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: .venv/ready docs  ## style, types and shapes of what will be committed, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/docs  ## the documentation as a web site, in site/
	$(BIN)/mkdocs build --quiet --strict

bench: .venv/ready  ## this project compared with its peers: the numbers and the plot of docs/performance.md, in about two hours
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/sweep.py

CLAIMS := itg stages questions shots bridges encoders reranking collapse capfilt

claims: .venv/ready  ## the paper's claims in miniature, for docs/claims.md, in several hours on two cores; continues after a kill
	$(BIN)/python benchmarks/claims/cost.py
	set -e; for claim in $(CLAIMS); do $(BIN)/python benchmarks/claims/$$claim.py; done
	$(BIN)/python benchmarks/claims/stages.py --llm t5 --output runs/claims/stages-t5

gpu:  ## on a machine with an NVIDIA GPU: check results and measure speed, without a network, in minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

gpu-rehearsal: .venv/ready  ## the same at tiny sizes on the CPU
	$(BIN)/python benchmarks/gpu.py --rehearse --again

clean:
	rm -rf .venv .lavis .gpu .venv-webdataset runs

# The constraints keep torch at a build without CUDA where the index has one: see CONTRIBUTING.md for GPUs.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('blip2 needs Python 3.11 or newer; this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
