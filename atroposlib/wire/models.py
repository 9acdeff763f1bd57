"""The control messages of the /v1 routes. Group payloads travel as columns (columns.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WireModel(BaseModel):
    """A message, validated at the edge and immutable inside; a misspelt field is an error, not a shrug."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunRequest(WireModel):
    """A trainer opens a run, or takes over the run of the same name."""

    run_name: str = Field(min_length=1, max_length=200)
    """The same name goes on where that run was; another name starts clean."""
    batch_size: int = Field(ge=1)
    """Sequences (not groups) of one optimizer step."""
    max_staleness: int = Field(default=4, ge=0)
    """A sequence trained at version v was sampled by no version older than v - max_staleness."""
    max_token_len: int = Field(default=-1, ge=-1)
    """Tokens of the longest sequence the trainer accepts; -1 for no limit."""
    num_steps: int = Field(ge=1)
    start_step: int | None = Field(default=None, ge=0)
    """Steps that the trainer's checkpoint holds: the first step it will lease. None: not stated, nothing checked."""
    group_size: int | None = Field(default=None, ge=1)
    """When given, environments must send groups of this size."""
    model_name: str = ""
    checkpoint_dir: str = ""
    save_checkpoint_interval: int = -1
    wandb_project: str | None = None
    wandb_group: str | None = None


class RunInfo(WireModel):
    """A run as its trainer sees it."""

    run_name: str
    session: int
    """Rises with every trainer that takes the run over; calls of an older session are refused."""
    policy_version: int
    """Newest version that the inference servers run; -1 before the first publication."""
    committed_step: int
    """Steps whose weights are safe in a checkpoint."""
    acknowledged_step: int
    """Steps that some trainer has used, in this or an earlier session."""
    request: RunRequest


class EnvRequest(WireModel):
    """An environment joins. The same name again is the same environment after a restart."""

    name: str = Field(min_length=1, max_length=200)
    group_size: int = Field(ge=1)
    max_token_len: int = Field(default=2048, ge=1)
    weight: float = Field(default=1.0, ge=0)
    min_batch_allocation: float | None = Field(default=None, ge=0, le=1)


class EnvInfo(WireModel):
    """What an environment needs to know to work."""

    env_id: int
    session: int
    """Tickets of the environment's earlier sessions are void."""
    run: RunInfo


class TicketRequest(WireModel):
    """Ask leave to start groups. Long-poll: the answer comes when a ticket is free or wait_s is over."""

    env_id: int
    session: int
    sequences: int = Field(ge=1)
    """Sequences of one group."""
    count: int = Field(default=1, ge=1, le=1024)
    """Groups wanted; fewer may be granted."""
    wait_s: float = Field(default=20.0, ge=0, le=60)


class Ticket(WireModel):
    """Leave to roll out one group."""

    ticket: str
    policy_version: int
    """Version of the inference servers when the ticket was given; none of the group's tokens can be older."""
    deadline_s: float
    """Seconds from now after which the ticket is void unless renewed."""


class TicketGrant(WireModel):
    """Tickets granted (maybe none yet), and where the run stands."""

    tickets: list[Ticket]
    policy_version: int
    step: int
    """Steps acknowledged so far."""
    is_finished: bool
    """The run has taken its last step: stop."""


class TicketUpdate(WireModel):
    """Renew or give back tickets."""

    env_id: int
    session: int
    tickets: list[str] = Field(max_length=4096)
    reason: str | None = None
    """Why they are given back: zero_variance, rollout_error, too_long, shutdown, ..."""


class TicketUpdateResult(WireModel):
    """Tickets that the call found alive; the others were void already."""

    alive: list[str]


class GroupResult(WireModel):
    """What became of one posted group."""

    group_id: str
    status: Literal["accepted", "duplicate", "retired"]
    """retired: counted and put away, because it can no longer be trained within the staleness bound."""
    reason: str | None = None


class GroupsResult(WireModel):
    """Answers in the order of the blobs."""

    results: list[GroupResult]


class LeaseRequest(WireModel):
    """A trainer asks for the batch of a step. The same step asked again gives the same batch."""

    session: int
    wait_s: float = Field(default=20.0, ge=0, le=60)


class LeaseWait(WireModel):
    """No batch yet, and what it waits for."""

    waiting_for: str


class AckRequest(WireModel):
    """The optimizer step used the batch; policy_version is what the inference servers now report."""

    session: int
    policy_version: int | None = None


class CommitRequest(WireModel):
    """The weights before this step are safe in a checkpoint: its batches need not be kept for replay."""

    session: int
    step: int = Field(ge=0)


class PolicyUpdate(WireModel):
    """The inference servers now run this version (asked back from them, not assumed)."""

    session: int
    policy_version: int = Field(ge=0)


class EnvStatus(WireModel):
    """One environment, as the server sees it."""

    env_id: int
    name: str
    last_seen_s: float
    """Seconds since its last call."""
    tickets: int
    groups_accepted: int


class Status(WireModel):
    """Where everything stands. Counters only: the cost does not depend on the queue."""

    run_name: str | None = None
    step: int = 0
    num_steps: int = 0
    policy_version: int = -1
    committed_step: int = 0
    queued_groups: int = 0
    queued_sequences: int = 0
    tickets_outstanding: int = 0
    admitted_sequences: int = 0
    capacity_sequences: int = 0
    groups_accepted: int = 0
    groups_duplicate: int = 0
    groups_retired: dict[str, int] = {}
    tickets_returned: dict[str, int] = {}
    trainer_last_seen_s: float | None = None
    trainer_waits_for: str | None = None
    envs: list[EnvStatus] = []


class GroupRecord(WireModel):
    """Where one accepted group is: the server's side of the ledger."""

    group_id: str
    env_id: int
    n_sequences: int
    n_tokens: int
    state: Literal["queued", "batched", "retired"]
    step: int | None
    oldest_version: int | None
    reason: str | None


class ErrorBody(WireModel):
    """Every error answer of the /v1 routes."""

    code: str
    detail: str
