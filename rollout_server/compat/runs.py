"""Which run an old trainer's registration means, and what becomes of the environments that are there already."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from atroposlib.errors import NoRunError
from atroposlib.wire.models import OLD_RUN_PREFIX, EnvRequest, EnvStatus, NackRequest, RunInfo, RunRequest
from rollout_server.compat.messages import NAME_CHARACTERS, UNLIMITED_STEPS, RegisterEnv, Registration
from rollout_server.compat.state import LegacyState
from rollout_server.compat.status_env import MIN_WEIGHT
from rollout_server.stores.base import Store

ALIVE_S = 10.0
"""Old environments ask for their status many times a second; one that was silent for this long is not carried over."""


async def run_or_none(store: Store) -> RunInfo | None:
    """The open run."""
    try:
        return await store.run_info()
    except NoRunError:
        return None


def is_legacy(run: RunInfo) -> bool:
    """Whether an old trainer owns the run."""
    return run.request.run_name.startswith(OLD_RUN_PREFIX)


async def register_trainer(store: Store, state: LegacyState, registration: Registration) -> RunInfo:
    """Go on with the open run where the registration means that one, else begin a new run."""
    async with state.registering:
        run = await run_or_none(store)
        if run is not None and continues(run, registration):
            run = await _continue(store, run, registration)
        else:
            run = await _begin(store, state, registration)
        # An old trainer publishes nothing; its policy is as new as its steps. Environments of the /v1 routes need to know.
        await store.set_policy(run.acknowledged_step, run.session)
        return await store.run_info()


def continues(run: RunInfo, registration: Registration) -> bool:
    """Whether this is the trainer of the open run again, and the run has steps left."""
    request = run.request
    return (
        is_legacy(run)
        and run.acknowledged_step < request.num_steps
        and (request.wandb_project or "") == (registration.wandb_project or "")
        and (request.wandb_group or "") == (registration.wandb_group or "")
        and request.checkpoint_dir == registration.checkpoint_dir
    )


def run_request(run_name: str, registration: Registration, *, start_step: int | None) -> RunRequest:
    """The registration as the store takes it."""
    return RunRequest(
        run_name=run_name,
        batch_size=registration.batch_size,
        max_token_len=max(registration.max_token_len, -1),
        num_steps=registration.num_steps if registration.num_steps >= 1 else UNLIMITED_STEPS,
        start_step=start_step,
        checkpoint_dir=registration.checkpoint_dir,
        save_checkpoint_interval=registration.save_checkpoint_interval,
        wandb_project=registration.wandb_project,
        wandb_group=registration.wandb_group,
    )


async def _continue(store: Store, run: RunInfo, registration: Registration) -> RunInfo:
    """Apply the new settings; queue, environments and the batch that was not acknowledged stay."""
    step = run.acknowledged_step
    is_ahead = registration.starting_step > step
    if is_ahead or registration.batch_size != run.request.batch_size:
        await _give_back_batch(store, run)
    start_step = registration.starting_step if is_ahead else None
    run = await store.open_run(run_request(run.request.run_name, registration, start_step=start_step))
    if is_ahead:
        await store.ack(registration.starting_step - 1, run.session, None)
        await store.commit(registration.starting_step, run.session)
        run = await store.run_info()
    return run


async def _give_back_batch(store: Store, run: RunInfo) -> None:
    """A batch formed by other settings: its groups go back to the queue."""
    status = await store.status()
    if status.formed_steps > run.acknowledged_step:
        await store.nack(run.acknowledged_step, NackRequest(session=run.session, reason="registered_anew"))


async def extend(store: Store, run: RunInfo) -> RunInfo:
    """One step more than was registered. Old servers never stopped at num_steps, and trainers count for themselves."""
    more = run.request.model_copy(update={"num_steps": run.acknowledged_step + 1, "start_step": None})
    return await store.open_run(more)


async def _begin(store: Store, state: LegacyState, registration: Registration) -> RunInfo:
    """A new run; the open one is archived. Environments that live on keep their env_ids."""
    status = await store.status()
    carried = carried_over(status.envs) if status.run_id is not None else state.carried_envs
    run_name = f"{OLD_RUN_PREFIX}{uuid.uuid4().hex[:12]}"
    start_step = max(registration.starting_step, 0)
    run = await store.open_run(run_request(run_name, registration, start_step=start_step))
    state.carried_envs = []
    for env in carried:
        info = await store.register_env(
            EnvRequest(
                name=env.name,
                group_size=env.group_size,
                max_token_len=env.max_token_len,
                weight=env.weight,
                min_batch_allocation=env.min_batch_allocation,
            )
        )
        if not _lives(env):
            await store.disconnect_env(info.env_id)
    return run


def carried_over(envs: Sequence[EnvStatus]) -> list[EnvStatus]:
    """Environments to register again in a new run, in order of env_id: all up to the last that lives.

    Dead ones among them only keep the places, so that those who live keep their ids.
    """
    in_order = sorted(envs, key=lambda env: env.env_id)
    while in_order and not _lives(in_order[-1]):
        in_order.pop()
    return in_order


def _lives(env: EnvStatus) -> bool:
    return env.is_connected and env.last_seen_s <= ALIVE_S


async def reset(store: Store, state: LegacyState) -> None:
    """Archive the run and start clean."""
    async with state.registering:
        if await run_or_none(store) is not None:
            state.carried_envs = carried_over((await store.status()).envs)
            state.largest_groups.clear()
        await store.close_run()


async def register_env(store: Store, state: LegacyState, message: RegisterEnv) -> tuple[int, str]:
    """A new environment, whatever its name. Returns its env_id and its numbered name."""
    async with state.registering:
        taken = {env.name for env in (await store.status()).envs}
        name = numbered_name(message.desired_name or "env", taken)
        info = await store.register_env(
            EnvRequest(
                name=name,
                group_size=max(message.group_size, 1),
                max_token_len=max(message.max_token_length, 1),
                weight=max(1.0 if message.weight is None else message.weight, MIN_WEIGHT),
                min_batch_allocation=_share(message.min_batch_allocation),
            )
        )
        state.largest_groups.pop(info.env_id, None)
        return info.env_id, name


def numbered_name(desired: str, taken: set[str]) -> str:
    """`desired_k`, k being how many environments of that name came before."""
    desired = desired[:NAME_CHARACTERS]
    k = sum(name.rpartition("_")[0] == desired for name in taken)
    while f"{desired}_{k}" in taken:
        k += 1
    return f"{desired}_{k}"


def _share(minimum: float | None) -> float | None:
    return None if minimum is None else min(max(minimum, 0.0), 1.0)
