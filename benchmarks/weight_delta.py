"""Delta against full on consecutive steps of the demo's training: share changed, bytes, seconds, bit-exactness.

python benchmarks/weight_delta.py record FOLDER [STEPS]   a real `atropos up`, ended after STEPS (12) steps, and its weights
python benchmarks/weight_delta.py measure FOLDER          both ways through a disk, without an engine
python benchmarks/weight_delta.py push FOLDER             both ways into a running vLLM: pause and whole publication

`record` needs vLLM, 2 GiB of memory for each of trainer and engine, and 5 GiB of disk for 12 steps. It stops a run that was
to take 56 steps, so the learning rate is the demo's: it falls linearly from 2e-5. `measure` and `push` want few other jobs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import httpx
import torch
from safetensors.torch import load_file, save_file

from atroposlib.launch.inference import InferenceConfig, has_gpu, vllm_command, wait_until_ready
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.results import PublishResult
from trainer.weight_sync.transports.delta import DeltaTransport
from trainer.weight_sync.transports.delta_codec import apply_in_place, encode_delta, is_same, read_header
from trainer.weight_sync.transports.delta_files import read_delta, read_full, write_delta, write_full
from trainer.weight_sync.transports.files import VersionFolders

MODEL = Path("models/SmolLM2-135M-Instruct")
RUN_NAME = "weight-delta"
STEP_TIMEOUT_S = 180.0
PORT = 9568

T = TypeVar("T")
Weights = dict[str, torch.Tensor]


def main() -> None:
    match sys.argv[1:]:
        case ["record", folder, *steps]:
            record(Path(folder), int(steps[0]) if steps else 12)
        case ["measure", folder]:
            measure(recorded(Path(folder)))
        case ["push", folder]:
            push(recorded(Path(folder)))
        case _:
            sys.exit(__doc__)


def record(folder: Path, steps: int) -> None:
    """Keep the weights of the first steps as the engines see them: bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    keep(MODEL / "model.safetensors", folder / "0.safetensors")
    run_folder = Path("runs") / RUN_NAME
    shutil.rmtree(run_folder, ignore_errors=True)
    arguments = ["up", "--plain", "--config", "configs/demo.yaml", f"name={RUN_NAME}", "trainer.save_steps=1"]
    run = subprocess.Popen([sys.executable, "-m", "atroposlib.cli.main", *arguments])
    try:
        for step in range(1, steps + 1):
            checkpoint = run_folder / "checkpoints" / f"checkpoint-{step}"
            wait_for(checkpoint / "atropos.json", run)
            keep(checkpoint / "model.safetensors", folder / f"{step}.safetensors")
            print(f"recorded step {step}", flush=True)
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(timeout=120)
    shutil.rmtree(run_folder)


def wait_for(path: Path, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not path.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"error: the run did not write {path}; see runs/{RUN_NAME}/logs")
        time.sleep(0.1)


def keep(source: Path, target: Path) -> None:
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(source).items()}, target)


def recorded(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    return paths if len(paths) > 1 else sys.exit(f"error: no steps in {folder}; record some first")


def in_memory(path: Path) -> Weights:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(paths: Sequence[Path]) -> None:
    """Print a row a step: what the trainer does before the pause, and what the engine does in it before it loads."""
    print(
        "| step | changed % | delta MB | full/delta | encode s | write s | read+apply s | full write s | full read s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        deltas = VersionFolders(Path(temporary) / "deltas", keep=2)
        fulls = VersionFolders(Path(temporary) / "full", keep=2)
        base = in_memory(paths[0])
        apply_in_place(base, encode_delta(base, base, base_version="", version=""), base_version="")  # warms up
        for step, path in enumerate(paths[1:], start=1):
            new = in_memory(path)
            rows.append(measure_step(base, new, step, deltas, fulls))
            print(f"| {step} | " + " | ".join(f"{value:.2f}" for value in rows[-1]) + " |", flush=True)
            base = new
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print("| median | " + " | ".join(f"{value:.2f}" for value in medians) + " |")
    print(f"reconstruction: all {len(rows)} steps bit-exact; load {os.getloadavg()[0]:.1f}")


def measure_step(
    base: Weights, new: Weights, step: int, deltas: VersionFolders, fulls: VersionFolders
) -> tuple[float, ...]:
    old_version, version = str(step - 1), str(step)
    encode_s, blob = timed(lambda: encode_delta(base, new, base_version=old_version, version=version))
    write_s, path = timed(lambda: write_delta(deltas, blob, version=version))
    apply_s, _ = timed(lambda: apply_in_place(base, read_delta(path), base_version=old_version))
    full_write_s, folder = timed(lambda: write_full(fulls, new, version=version, dtype=torch.bfloat16))
    full_read_s, reread = timed(lambda: read_full(folder, version=version))
    if not (is_same(base, new) and is_same(reread, new)):
        sys.exit(f"error: step {step} was not rebuilt bit for bit")
    elements, full_bytes = sum(tensor.numel() for tensor in new.values()), sum(tensor.nbytes for tensor in new.values())
    changed = 100 * read_header(blob).changed / elements
    sizes = (changed, len(blob) / 1e6, full_bytes / len(blob))
    return *sizes, encode_s, write_s, apply_s, full_write_s, full_read_s


def push(paths: Sequence[Path]) -> None:
    """Publish all steps as deltas to one server, then each of them whole, as a trainer that has just started would."""
    config = InferenceConfig(model=str(MODEL), port=PORT, weight_transfer="delta")
    argv, env = vllm_command(config, has_gpu=has_gpu())
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "vllm.log"
        with log.open("wb") as out:
            server = subprocess.Popen(argv, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True)
        try:
            asyncio.run(wait_until_ready(config.url, server, log, timeout_s=300))
            weights = [{name: tensor.float() for name, tensor in load_file(path).items()} for path in paths]
            publisher = publisher_to(config.url, Path(temporary))
            publisher.publish(0, weights[0].items())  # reads the model folder, once
            by_delta = [
                (publisher.publish(i, step.items()), logprobs(config.url))
                for i, step in enumerate(weights[1:], start=1)
            ]
            publisher.close()
            by_full = [
                (push_whole(config.url, Path(temporary), 100 + i, step), logprobs(config.url))
                for i, step in enumerate(weights[1:], start=1)
            ]
            report("delta", [result for result, _ in by_delta])
            report("full", [result for result, _ in by_full])
            is_equal = [values for _, values in by_delta] == [values for _, values in by_full]
            print("logprobs after each delta equal those after each full push, bit for bit:", is_equal)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def publisher_to(url: str, folder: Path) -> WeightPublisher:
    calls = ThreadPoolExecutor(max_workers=4)
    transport = DeltaTransport(calls, folder=folder / "weights", keep=2, dtype=torch.bfloat16, model_folder=str(MODEL))
    return WeightPublisher([VllmControl(url)], transport, calls)


def push_whole(url: str, folder: Path, version: int, weights: Weights) -> PublishResult:
    publisher = publisher_to(url, folder)
    try:
        return publisher.publish(version, weights.items())
    finally:
        publisher.close()


def logprobs(url: str) -> list[float]:
    body = {"token_ids": [1, 4093, 198, 1780], "sampling_params": {"max_tokens": 16, "temperature": 0, "logprobs": 0}}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=180).raise_for_status().json()
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


def report(name: str, results: Sequence[PublishResult]) -> None:
    pauses = [server.seconds for result in results for server in result.servers]
    wholes = [result.seconds for result in results]
    print(
        f"{name}: pause median {statistics.median(pauses):.2f} s (max {max(pauses):.2f}), whole publication "
        f"{statistics.median(wholes):.2f} s (max {max(wholes):.2f}), {len(results)} versions, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
