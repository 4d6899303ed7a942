"""The disk tier: what it keeps, what it refuses to believe, and what a killed process leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.runtime.disk import DiskTier, fingerprint
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from runtime_models.pairs import make_pair

PROMPT = [*range(40, 75), 3, 3, 8]


def block(number: int) -> dict[str, mx.array]:
    return {"0.keys": mx.full((1, 2, 4, 8), number, mx.bfloat16)}


def digest(number: int) -> bytes:
    return number.to_bytes(16)


def test_blocks_come_back_as_they_went(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20, "model")
    tier.put(digest(1), block(3))
    assert tier.get(digest(1)) is not None  # while it is being written, too
    tier.close()
    again = DiskTier(tmp_path, 1 << 20, "model")
    assert digest(1) in again and digest(2) not in again
    found = again.get(digest(1))
    assert found is not None
    assert (mx.array(found["0.keys"]).view(mx.bfloat16) == block(3)["0.keys"]).all()
    assert DiskTier(tmp_path, 1 << 20, "other").get(digest(1)) is None


def test_the_limit_holds_and_the_oldest_goes(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2500, "model")
    for number in range(12):
        tier.put(digest(number), block(number))
        tier.flush()
    size = sum(path.stat().st_size for path in tier.folder.iterdir())
    assert 1500 < size == tier.nbytes <= 2500
    assert digest(11) in tier and digest(0) not in tier
    assert tier.stats.removed > 0
    tier.close()
    assert DiskTier(tmp_path, 1000, "model").nbytes <= 1000


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "empty"])
def test_a_broken_file_is_ignored_and_removed(damage: str, tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20, "model")
    tier.put(digest(1), block(3))
    tier.put(digest(2), block(4))
    tier.flush()
    path = tier.folder / f"{digest(1).hex()}.safetensors"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "renamed":
        path.write_bytes((tier.folder / f"{digest(2).hex()}.safetensors").read_bytes())
    else:
        path.write_bytes(b"")
    assert tier.get(digest(1)) is None
    assert tier.stats.broken == 1
    assert not path.exists() and digest(1) not in tier
    assert tier.get(digest(2)) is not None


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 1 << 20, "model")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    tier.put(digest(1), block(3))
    tier.flush()
    assert digest(1) not in tier
    assert tier.stats.given_up == 1
    assert list(tier.folder.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeRefusal, match="disk cache"):
        DiskTier(tmp_path / "file", 100, "model")
    with pytest.raises(RuntimeRefusal, match="at least one byte"):
        DiskTier(tmp_path, 0, "model")


def test_other_weights_have_other_names() -> None:
    one, other = make_pair("plain", 1)[1], make_pair("plain", 2)[1]
    assert fingerprint(one, 4, None) == fingerprint(one, 4, None)
    assert fingerprint(one, 4, None) != fingerprint(other, 4, None)
    assert fingerprint(one, 4, None) != fingerprint(one, 8, None)


def test_evicted_prefixes_come_back_from_disk(tmp_path: Path) -> None:
    _, rewritten = make_pair("plain", 3)

    def engine() -> Engine:
        return Engine(rewritten, block_size=4, num_blocks=13, disk=(tmp_path, 1 << 20))

    first = engine()
    name = first.add(Request(PROMPT, 6))
    tokens = first.run()[name]
    for other in range(3):  # these need all blocks
        first.add(Request([90 + other] * 40, 6))
        first.run()
    name = first.add(Request(PROMPT, 6))
    assert first.run()[name] == tokens
    assert first.store is not None
    assert first.store.stats.from_disk >= 32
    first.close()
    # Another process finds them too.
    second = engine()
    name = second.add(Request(PROMPT, 6))
    assert second.run()[name] == tokens
    assert second.store is not None
    assert second.store.stats.from_disk == 36
    second.close()
    # What is broken is computed.
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    third = engine()
    name = third.add(Request(PROMPT, 6))
    assert third.run()[name] == tokens
    assert third.store is not None and third.store.stats.from_disk == 0


def test_wrong_content_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails if blocks come back with another content."""
    _, rewritten = make_pair("plain", 3)
    first = Engine(rewritten, block_size=4, num_blocks=13, disk=(tmp_path, 1 << 20))
    name = first.add(Request(PROMPT, 6))
    tokens = first.run()[name]
    first.close()
    plain = DiskTier.get

    def get(self, digest):
        found = plain(self, digest)
        return found and {name: np.zeros_like(value) for name, value in found.items()}

    monkeypatch.setattr(DiskTier, "get", get)
    second = Engine(rewritten, block_size=4, num_blocks=13, disk=(tmp_path, 1 << 20))
    name = second.add(Request(PROMPT, 6))
    assert second.run()[name] != tokens


def test_models_with_windows_are_refused(tmp_path: Path) -> None:
    for name in ("shared_windows", "hybrid"):
        with pytest.raises(RuntimeRefusal, match="full attention"):
            Engine(make_pair(name, 3)[1], disk=(tmp_path, 1 << 20))


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_disk import *
tier = DiskTier(Path({folder!r}), 1 << 30, "model")
for number in range(1_000_000):
    tier.put(digest(number), {{"0.keys": mx.full((1, 2, 64, 512), number % 97, mx.bfloat16)}})
    tier.flush()
    print(number, flush=True)
"""


def test_killing_the_writer_loses_nothing_else(tmp_path: Path) -> None:
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20:
            break
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tier = DiskTier(tmp_path, 1 << 30, "model")
    assert not list(tier.folder.glob("*.tmp"))
    files = list(tier.folder.iterdir())
    assert len(files) >= 21
    for number in range(len(files)):
        found = tier.get(digest(number))
        assert found is not None
        assert (mx.array(found["0.keys"]).view(mx.bfloat16) == number % 97).all()
    assert tier.stats.broken == 0
