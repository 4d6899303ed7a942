#!/bin/sh
# Lint, types and tests. `scripts/test.sh --all` adds the tests marked slow.
all=${1:-}
set -- dev,runner,serve,vlm
. "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python scripts/typecheck.py
# 1: some folders of mlx_vlm are refused, as their manifests say.
.venv/bin/mlxrewrite -q mlx_lm.models mlx_vlm.models || [ $? -eq 1 ]
.venv/bin/mlxrewrite -q --check mlx_lm.models mlx_vlm.models
.venv/bin/python -m pytest -q -n 2 -m "not slow and not metal and not cuda"
if [ "$all" = --all ]; then
    .venv/bin/python -m pytest -q -n 2 -m "slow and not metal and not cuda"
fi
