"""FAKE environment: the command line of a real one, groups of made-up tokens, a reward that rises with the version."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path

import httpx

from atroposlib.client import RolloutClient
from atroposlib.wire.columns import build_group
from atroposlib.wire.layout import NOT_SAMPLED
from atroposlib.wire.models import EnvRequest, TicketRequest

KNOWN = frozenset(
    [
        "env.rollout_server_url",
        "env.tokenizer_name",
        "env.run_dir",
        "env.seed",
        "env.group_size",
        "env.wandb_name",
        "env.data_dir_to_save_evals",
        "env.max_token_length",
        "openai.base_url",
        "openai.model_name",
        "openai.server_type",
        "student.base_url",
        "student.model_name",
        "student.server_type",
    ]
)


async def serve(options: dict[str, str]) -> None:
    run_dir, size, name = Path(options["env.run_dir"]), int(options["env.group_size"]), options["env.wandb_name"]
    ledger = run_dir / "ledger" / f"env-{name}.jsonl"
    ledger.parent.mkdir(exist_ok=True)
    async with RolloutClient(options["env.rollout_server_url"]) as client:
        info = await client.register_env(EnvRequest(name=name, group_size=size))
        sampled = 0
        while True:
            request = TicketRequest(env_id=info.env_id, session=info.session, sequences=size, wait_s=2.0)
            grant = await client.request_tickets(request)
            if grant.is_finished:
                return
            for ticket in grant.tickets:
                group = build_group(
                    group_id=uuid.uuid4().hex,
                    env_id=info.env_id,
                    tokens=[[1, 2, 3, 4]] * size,
                    loss_masks=[[0, 0, 1, 1]] * size,
                    inference_logprobs=[[0.0, 0.0, -0.5, -0.5]] * size,
                    versions=[[(NOT_SAMPLED, 2), (ticket.policy_version, 2)]] * size,
                    scores=[min(1.0, ticket.policy_version / 10 + i % 2) for i in range(size)],
                    ticket=ticket.ticket,
                    finish_reasons=("stop",) * size,
                )
                await client.post_groups([group])
                with ledger.open("a") as file:
                    file.write(json.dumps({"group_id": group.group_id, "sequences": size}) + "\n")
                with (run_dir / "env_metrics.jsonl").open("a") as file:
                    sampled += 2 * size
                    line = {
                        "time": time.time(),
                        "env": name,
                        "env/sampled_tokens": sampled,
                        "env/requests_in_flight": size,
                    }
                    file.write(json.dumps(line) + "\n")
                await asyncio.sleep(0.05)


def evaluate(options: dict[str, str]) -> None:
    folder = Path(options["env.data_dir_to_save_evals"])
    folder.mkdir(parents=True)
    reward = 0.25 if folder.name == "before" else 0.75
    (folder / "metrics.json").write_text(json.dumps({"results": {"all": {"heldout_reward": reward}}}))


def main(mode: str, *words: str) -> None:
    is_dry_run = "--dry-run" in words
    words = tuple(word for word in words if word != "--dry-run")
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    if unknown := sorted(options.keys() - KNOWN):
        print(f"error: unknown option --{unknown[0]}\nhint: see --help", file=sys.stderr)
        sys.exit(2)
    if is_dry_run:
        return
    if "student.base_url" in options:
        httpx.get(options["student.base_url"].removesuffix("v1") + "health").raise_for_status()
    if mode == "serve":
        asyncio.run(serve(options))
    else:
        evaluate(options)


if __name__ == "__main__":
    main(*sys.argv[1:])
