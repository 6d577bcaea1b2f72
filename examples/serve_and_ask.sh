#!/bin/sh
# Start an OpenAI server of a model named "mla", ask it once, stop it: what vllm_serve.sh and sglang_serve.sh do.
#
#   examples/serve_and_ask.sh COMMAND [ARGUMENT ...]
#
# --host and --port are added. PORT (8000) and WAIT_SECONDS (900, large models load for long) can be set in the environment.
set -eu
url=http://127.0.0.1:${PORT:-8000}
export no_proxy=127.0.0.1 # the answer comes from this machine, whatever the proxy

"$@" --host 127.0.0.1 --port "${PORT:-8000}" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

# get URL [JSON TO POST]: as `curl -s`, which not every machine has
get() {
  python3 -c '
import sys, urllib.request as web
url, *data = sys.argv[1:]
request = web.Request(url, *(d.encode() for d in data), headers={"Content-Type": "application/json"})
print(web.urlopen(request, timeout=60).read().decode())' "$@"
}

end=$(($(date +%s) + ${WAIT_SECONDS:-900}))
until get "$url/health" >/dev/null 2>&1; do
  kill -0 "$server" 2>/dev/null || { echo "The server ended before it was ready; the reason stands above." >&2; exit 1; }
  [ "$(date +%s)" -lt "$end" ] || { echo "The server was not ready in ${WAIT_SECONDS:-900} seconds." >&2; exit 1; }
  sleep 1
done

echo "The server answers:"
get "$url/v1/completions" \
  '{"model": "mla", "prompt": "Attention lets every token", "max_tokens": 24, "temperature": 0}'

kill "$server"
wait "$server" # its exit status becomes ours if it is not 0
trap - EXIT
echo "The server has stopped."
