#!/bin/sh
# Start an OpenAI server with SGLang and mla_backend, ask it once, stop it.
#
#   examples/sglang_serve.sh MODEL [options of sglang serve]
#
# MODEL is a folder or a Hugging Face name of an MLA model. A tiny one, on a machine without a GPU:
#
#   python examples/tiny_checkpoint.py models/tiny
#   examples/sglang_serve.sh models/tiny --device cpu --sampling-backend pytorch --grammar-backend none --max-total-tokens 8192
#
# PORT and WAIT_SECONDS as in serve_and_ask.sh.
set -eu
model=${1:?usage: examples/sglang_serve.sh MODEL [options of sglang serve]}
shift
exec "$(dirname "$0")/serve_and_ask.sh" \
  sglang serve --model-path "$model" --attention-backend mla_backend --served-model-name mla "$@"
