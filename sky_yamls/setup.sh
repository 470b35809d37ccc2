#!/usr/bin/env bash
# Make the environment of a training machine, ~/venv, from the root of the repository: setup.sh [EXTRA,...].
#
# SkyPilot runs it at every start, on new machines and on kept ones. For the 3 GB of a GPU's PyTorch, uv takes about a minute on a
# new machine and seconds on a kept one; conda would take ten minutes, and SkyPilot no longer installs it.
set -euo pipefail
# SkyPilot has proven BUCKET, which is mounted, before it rented this machine; but it knows stores that the trainer does not
# (r2://, https://), and a YAML without the mount takes anything. Without its scheme it would be a directory of this machine.
case "$BUCKET" in
  s3://[!/]* | gs://[!/]* | az://[!/]* | hf://buckets/[!/]* | file:///[!/]*) ;;
  *)
    echo "error: BUCKET: '$BUCKET' is no address of storage, such as s3://my-chats, gs://, az:// or hf://buckets/" >&2
    exit 1
    ;;
esac
export PATH="$HOME/.local/bin:$PATH" # SkyPilot puts uv there
uv venv --quiet --python 3.12 --allow-existing ~/venv
uv pip install --quiet --python ~/venv --torch-backend auto -c constraints.txt ".[cloud${1:+,$1}]" # auto: as the driver needs
