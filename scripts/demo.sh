#!/bin/sh
# Rewrites the installed mlx_lm and generates text with a real model through a rewritten file.
set --
. "$(dirname "$0")/setup.sh"
.venv/bin/mlxrewrite
.venv/bin/python examples/smollm2.py models/smollm2
.venv/bin/mlxrewrite generate --model models/smollm2 --max-tokens 60 \
    --prompt "What is the capital of France?" \
    --prompt "Write one sentence about the sea."
