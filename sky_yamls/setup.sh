#!/usr/bin/env bash
# Make the environment of a training machine, ~/venv, from the root of the repository: setup.sh [EXTRA,...].
#
# SkyPilot runs it at every start, on new machines and on kept ones. For the 3 GB of a GPU's PyTorch, uv takes about a minute on a
# new machine and seconds on a kept one; conda would take ten minutes, and SkyPilot no longer installs it.
set -euo pipefail
export PATH="$HOME/.local/bin:$PATH" # SkyPilot puts uv there
uv venv --quiet --python 3.12 --allow-existing ~/venv
uv pip install --quiet --python ~/venv --torch-backend auto -c constraints.txt ".[cloud${1:+,$1}]" # auto: as the driver needs
