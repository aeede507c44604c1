# The commands of the README. PROFILE=mini|smoke|record|gpt2-lite|gpt2|pythia; PYTHON=python3.12 to choose an interpreter.
PROFILE ?= $(or $(TSAE_PROFILE),mini)
PYTHON ?= python3
NB ?=
PY := .venv/bin/python

.PHONY: figures redraw record readme verify test kill testbed saes bench saelens clean

figures: .venv/ready        ## every notebook; writes figures/$(PROFILE)/
	$(PY) notebooks/run.py --profile $(PROFILE)

fig%: .venv/ready           ## one notebook by its number: make fig6
	$(PY) notebooks/run.py $* --profile $(PROFILE)

redraw: .venv/ready         ## figures/record/ again from its CSVs
	$(PY) notebooks/run.py --redraw

record: .venv/ready         ## hours on two cores; resumes; NB=06 for one notebook
	$(PY) notebooks/run.py --record $(NB)

test: .venv/ready           ## lint, unit tests, every notebook at smoke
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests
	$(PY) -m pytest -q --nbmake notebooks/

verify: .venv/ready         ## check contributed figures: make verify PROFILE=gpt2 (the default here)
	$(PY) notebooks/verify.py $(if $(filter command environment,$(firstword $(origin PROFILE))),$(PROFILE),gpt2)

readme: .venv/ready         ## the README's tables again, from figures/record/
	$(PY) notebooks/readme.py

kill: .venv/ready           ## SIGKILL a training twenty times and compare its end with an undisturbed one
	TSAE_KILLS=20 $(PY) -m pytest -q -s tests/test_resume.py -k killed

testbed: .venv/ready        ## train the embedded language model from nothing
	$(PY) testbed/train.py

saes: .venv/ready           ## the committed pair, from the record's cache
	$(PY) testbed/export_saes.py

bench: .venv/ready .venv-peers/ready  ## speed against the peers, side by side
	$(PY) benchmarks/bench.py

saelens: .venv-peers/ready  ## round trips of files with the real sae_lens, in the peers' environment
	.venv-peers/bin/python -m pytest -q tests/saelens_round_trips.py

.venv-peers/ready: benchmarks/requirements-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.12'"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-peers .cache figures/mini figures/smoke
