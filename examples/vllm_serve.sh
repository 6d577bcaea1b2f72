#!/bin/sh
# Start an OpenAI server with vLLM and mla_backend, ask it once, stop it.
#
#   examples/vllm_serve.sh MODEL [options of vllm serve]
#
# MODEL is a folder or a Hugging Face name of an MLA model. A tiny one, on a machine without a GPU:
#
#   python examples/tiny_checkpoint.py models/tiny
#   examples/vllm_serve.sh models/tiny --enforce-eager --kv-cache-memory-bytes 268435456
#
# PORT and WAIT_SECONDS as in serve_and_ask.sh.
set -eu
model=${1:?usage: examples/vllm_serve.sh MODEL [options of vllm serve]}
shift
exec "$(dirname "$0")/serve_and_ask.sh" vllm serve "$model" --attention-backend CUSTOM --served-model-name mla "$@"
