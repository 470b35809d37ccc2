#!/usr/bin/env bash
# The environment of a training machine, in ~/venv, from the root of the repository: setup.sh [EXTRA,...].
#
# SkyPilot runs it at every start, on fresh machines as on kept ones. uv takes a minute or so for the 3 GB of a GPU's PyTorch on
# a fresh machine, and seconds where they are there; conda would take ten, and is no longer installed by SkyPilot.
set -euo pipefail
export PATH="$HOME/.local/bin:$PATH" # SkyPilot puts uv there
uv venv --quiet --python 3.12 --allow-existing ~/venv
uv pip install --quiet --python ~/venv --torch-backend auto -c constraints.txt ".[cloud${1:+,$1}]" # a build for the driver found
