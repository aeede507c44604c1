# The README's commands. PROFILE=mini|smoke|record|gpt2-lite|gpt2|pythia; PYTHON=python3.12 chooses
# an interpreter; NB=06 picks one notebook of a record.
PROFILE ?= $(or $(TSAE_PROFILE),mini)
PYTHON ?= python3
NB ?=
PY := .venv/bin/python
PEERS := .venv-peers/bin/python
RUN := $(PY) tools/run_notebooks.py

.PHONY: help figures redraw replay record docs unblind verify test test-resume test-saelens testbed \
	smollm2 export-saes bench scan hostile clean

help:                       ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s:

figures: .venv/ready        ## every notebook; writes figures/$(PROFILE)/
	$(RUN) --profile $(PROFILE)

fig%: .venv/ready           ## one notebook by its number: make fig6
	$(RUN) $* --profile $(PROFILE)

redraw: .venv/ready         ## the committed figures and verdicts again from their CSVs
	$(RUN) --redraw

replay: .venv/ready         ## redraw, and keep the executed notebooks
	$(RUN) --redraw --keep

record: .venv/ready         ## train and measure the committed record: hours; resumes
	$(RUN) --record $(NB)

docs: .venv/ready           ## the generated parts of README.md and docs/, from the record
	$(PY) tools/build_docs.py

unblind: .venv/ready        ## table 1 from the scores of both raters of the blind study
	$(PY) tools/blind_study.py figures/record

verify: .venv/ready         ## check contributed figures: make verify PROFILE=gpt2
	$(PY) tools/verify.py $(if $(filter command environment,$(firstword $(origin PROFILE))),$(PROFILE),gpt2)

test: .venv/ready           ## lint, unit tests, every notebook at profile smoke
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --nbmake -n 2 notebooks/

test-resume: .venv/ready    ## kill a training twenty times and compare its end
	TSAE_KILLS=20 $(PY) -m pytest -q -s tests/test_resume.py -k killed

test-saelens: .venv-peers/ready  ## the real sae_lens, and attach on TransformerLens 3
	PYTHONPATH=. $(PEERS) -m pytest -q tests/saelens_round_trips.py
	PYTHONPATH=. $(PEERS) -m pytest -q tests/test_attach.py -k hooked

testbed: .venv/ready        ## train the embedded language model from nothing
	$(PY) testbed/train.py

smollm2: .venv/ready        ## fetch and dequantise SmolLM2-135M, a published language model
	$(PY) testbed/smollm2.py

export-saes: .venv/ready    ## the committed pair of SAEs, from the record's cache
	$(PY) testbed/export_saes.py

bench: .venv/ready .venv-peers/ready  ## speed against other libraries, side by side
	$(PY) benchmarks/bench.py

scan: .venv/ready           ## every causal architecture of transformers, tiny and random
	$(PY) tools/scan_architectures.py

hostile: .venv/ready        ## hostile inputs against slow paths: folders, shapes, models, prompts
	$(PY) tools/hostile_inputs.py

clean:                      ## remove environments, caches and scratch figures
	rm -rf .venv .venv-peers .cache figures/mini figures/smoke

.venv-peers/ready: benchmarks/requirements-peers.txt
	test -x $(PEERS) || $(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.12'"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
