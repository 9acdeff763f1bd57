"""Inference servers of a SLURM job, from its variables: one URL for each server process on each inference node."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
from collections.abc import Mapping

from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)

FIRST_PORT = 9000
GPUS_PER_NODE = 8
SCONTROL_TIMEOUT_S = 10.0

_ITEM = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def slurm_urls(environ: Mapping[str, str]) -> list[str] | None:
    """Base URLs of the job's inference servers; None outside a job and in a job of one node.

    Args:
        environ: SLURM_JOB_NODELIST; NUM_TRAINING_NODES, the first hosts, which train (0); INFER_TP, GPUs of one server (1).
    Raises:
        ConfigError: a variable is not a number in range, or leaves no node for inference.
    """
    nodelist = environ.get("SLURM_JOB_NODELIST", "")
    if not nodelist:
        return None
    hosts = hostnames(nodelist)
    if len(hosts) < 2:
        return None
    training_nodes = _whole_number(environ, "NUM_TRAINING_NODES", default=0, lowest=0, highest=len(hosts) - 1)
    tensor_parallel = _whole_number(environ, "INFER_TP", default=1, lowest=1, highest=GPUS_PER_NODE)
    ports = range(FIRST_PORT, FIRST_PORT + GPUS_PER_NODE // tensor_parallel)
    return [f"http://{host}:{port}/v1" for host in hosts[training_nodes:] for port in ports]


def hostnames(nodelist: str) -> list[str]:
    """Hosts of a SLURM node list: asked of scontrol, or read here where scontrol does not work."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True, text=True, check=True, timeout=SCONTROL_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        log.info("scontrol cannot expand %r (%s): reading it here", nodelist, error)
        return expand_nodelist(nodelist)
    return done.stdout.split()


def expand_nodelist(nodelist: str) -> list[str]:
    """Hosts of a node list such as ``gpu[01-03,7],login``; leading zeros stay.

    Raises:
        ConfigError: the brackets or a range make no sense.
    """
    items = _ITEM.findall(nodelist)
    if ",".join(items) != nodelist or not items:
        raise _unreadable(nodelist)
    return [host for item in items for host in _expand_item(item, nodelist)]


def _expand_item(item: str, nodelist: str) -> list[str]:
    parts = [
        _expand_ranges(match[1], nodelist) if match[2] is None else [match[2]] for match in _PART.finditer(item.strip())
    ]
    return ["".join(choice) for choice in itertools.product(*parts)]


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        if match is None:
            raise _unreadable(nodelist)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _unreadable(nodelist)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _unreadable(nodelist: str) -> ConfigError:
    return ConfigError(f"SLURM_JOB_NODELIST={nodelist!r} is no node list; expected e.g. gpu[01-04,7] or a,b")


def _whole_number(environ: Mapping[str, str], name: str, *, default: int, lowest: int, highest: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and lowest <= int(text) <= highest):
        raise ConfigError(f"{name}={text!r}: expected a whole number from {lowest} to {highest}")
    return int(text)
