"""Two processes on loopback: each model's own `shard`, the same tokens as one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.load import load
from serving import make_model

PROMPTS = [[5, 9, 2, 7], [3], [*range(40, 75)], [5, 9, 2, 7, 8, 8]]
# Beside this Python first: an environment need not be on the path.
LAUNCH = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SCRIPT = """
import json
import sys

import mlx.core as mx
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.load import load

group = mx.distributed.init()
model, _ = load(sys.argv[1])
model.shard(group)
engine = Engine(model, block_size=4, num_blocks=24, max_rows=16, max_running=3)
names = [engine.add(Request(prompt, 12)) for prompt in json.loads(sys.argv[2])]
found = engine.run()
result = {"tokens": [found[name] for name in names], "heads": model.layers[0].self_attn.n_kv_heads}
if group.rank() == 0:
    print("RESULT", group.size(), json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.skipif(LAUNCH is None, reason="mlx.launch is not installed")
def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    script = tmp_path / "part.py"
    script.write_text(SCRIPT)
    engine = Engine(load(folder)[0], block_size=4)
    names = [engine.add(Request(prompt, 12)) for prompt in PROMPTS]
    found = engine.run()
    launch = [LAUNCH, "-n", "2", "--python", sys.executable, str(script), str(folder)]
    done = subprocess.run(
        [*launch, json.dumps(PROMPTS)], capture_output=True, text=True, timeout=240, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == 1, done.stdout + done.stderr
    _, size, text = lines[0].split(" ", 2)
    result = json.loads(text)
    assert size == "2" and result["heads"] == 1
    assert result["tokens"] == [found[name] for name in names]
