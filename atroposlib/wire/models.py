"""The control messages of the /v1 routes. Group payloads travel as columns (columns.py)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LatePolicy = Literal["wait", "requeue", "drop"]

MAX_BATCH_SIZE = 1 << 20
"""Sequences. The arithmetic of which group sizes fill a batch takes memory and time that grow with it."""


class WireModel(BaseModel):
    """A message, validated at the edge and immutable inside; a misspelt field is an error, not a shrug, and true is not 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


OLD_RUN_PREFIX = "atropos-"
"""Names of runs that a trainer of the old protocol opened by POST /register."""


class RunRequest(WireModel):
    """A trainer opens a run, or takes over the run of the same name."""

    run_name: str = Field(min_length=1, max_length=200)
    """The same name goes on where that run was; another name starts clean."""
    batch_size: int = Field(ge=1, le=MAX_BATCH_SIZE)
    """Sequences (not groups) of one optimizer step."""
    max_staleness: int = Field(default=4, ge=0)
    """A sequence trained at version v was sampled by no version older than v - max_staleness."""
    late_policy: LatePolicy = "wait"
    """What happens to a group in flight that a batch cannot leave room for: wait for it; requeue its item (the ticket is
    void, the environment starts the item anew); drop it. Only wait leaves the distribution of lengths as generated."""
    max_token_len: int = Field(default=-1, ge=-1)
    """Tokens of the longest sequence the trainer accepts; -1 for no limit."""
    num_steps: int = Field(ge=1)
    start_step: int | None = Field(default=None, ge=0)
    """Steps that the trainer's checkpoint holds: the first step it will lease. None: not stated, nothing checked."""
    group_size: int | None = Field(default=None, ge=1, le=MAX_BATCH_SIZE)
    """When given, environments must send groups of this size."""
    model_name: str = ""
    checkpoint_dir: str = ""
    save_checkpoint_interval: int = -1
    wandb_project: str | None = None
    wandb_group: str | None = None


class RunInfo(WireModel):
    """A run as its trainer sees it."""

    run_name: str
    run_id: str
    """Made by the server when the run began; a group that names another run is retired."""
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
    group_size: int = Field(ge=1, le=MAX_BATCH_SIZE)
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
    shard: int = Field(default=0, ge=0)
    """Which part of the batch this rank wants; parts hold whole groups and about the same number of tokens."""
    n_shards: int = Field(default=1, ge=1, le=65536)

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        if self.shard >= self.n_shards:
            raise ValueError(f"shard={self.shard} does not exist in n_shards={self.n_shards}; shards count from 0")
        return self


class LeaseWait(WireModel):
    """No batch yet, and what it waits for."""

    waiting_for: str


class AckRequest(WireModel):
    """The optimizer step used the batch; policy_version is what the inference servers now report."""

    session: int
    policy_version: int | None = None


class NackRequest(WireModel):
    """The trainer cannot use a batch: its groups go back to the queue, but for those it names, which are retired."""

    session: int
    reason: str = Field(min_length=1, max_length=200)
    retire: list[str] = Field(default=[], max_length=65536)
    """group_ids that must not come again."""


class NackResult(WireModel):
    """What became of the groups of the batch, and of batches formed after it."""

    requeued: int
    retired: int


class TrainerRenewal(WireModel):
    """The trainer lives, though its step takes long."""

    session: int


class CommitRequest(WireModel):
    """The weights before this step are safe in a checkpoint: its batches need not be kept for replay."""

    session: int
    step: int = Field(ge=0)


class PolicyUpdate(WireModel):
    """The inference servers now run this version (asked back from them, not assumed)."""

    session: int
    policy_version: int = Field(ge=0)


Role = Literal["policy", "frozen", "teacher", "judge"]


class InferenceServer(WireModel):
    """An inference server joins the registry, or says again that it is there. Silent ones are shown as lost."""

    url: str = Field(min_length=1, max_length=2000)
    role: Role = "policy"
    """Only policy servers receive weights."""
    model_name: str = ""
    policy_version: int | None = Field(default=None, ge=0)
    """What the server itself reports; None when it cannot."""
    problem: str = Field(default="", max_length=2000)
    """Why it gets no traffic or no weights, in words; empty when all is well."""


class InferenceServerStatus(WireModel):
    """One inference server, as the registry knows it."""

    server: InferenceServer
    last_seen_s: float
    """Seconds since it was last reported."""


class InferenceServerLeave(WireModel):
    """An inference server goes."""

    url: str


class EnvStatus(WireModel):
    """One environment, as the server sees it."""

    env_id: int
    name: str
    group_size: int
    max_token_len: int
    weight: float
    min_batch_allocation: float | None
    is_connected: bool
    """False once it said goodbye."""
    last_seen_s: float
    """Seconds since its last call."""
    tickets: int
    queued_groups: int
    queued_sequences: int
    groups_accepted: int
    trained_tokens: int
    """Tokens of its groups in batches so far."""


class Status(WireModel):
    """Where everything stands. Counters only: the cost does not depend on the queue."""

    run_name: str | None = None
    run_id: str | None = None
    batch_size: int = 0
    max_staleness: int = 0
    late_policy: LatePolicy = "wait"
    step: int = 0
    """Steps acknowledged."""
    formed_steps: int = 0
    """Batches formed, those that the trainer holds included."""
    num_steps: int = 0
    policy_version: int = -1
    committed_step: int = 0
    queued_groups: int = 0
    queued_sequences: int = 0
    queued_bytes: int = 0
    largest_queued_group: int = 0
    """Sequences."""
    group_sizes_queued: list[int] = []
    """The different sizes, in sequences; at most 64 of them."""
    tickets_outstanding: int = 0
    sequences_in_flight: int = 0
    admitted_sequences: int = 0
    capacity_sequences: int = 0
    groups_accepted: int = 0
    groups_duplicate: int = 0
    groups_retired: dict[str, int] = {}
    tickets_returned: dict[str, int] = {}
    trainer_last_seen_s: float | None = None
    trainer_waits_for: str | None = None
    envs: list[EnvStatus] = []
    inference_servers: list[InferenceServerStatus] = []


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


class GroupRecords(WireModel):
    """A page of the ledger, in order of arrival."""

    records: list[GroupRecord]
    next: int | None
    """Ask for the next page with after=next; None on the last page."""


class Event(WireModel):
    """Something that happened, for people who watch."""

    id: int
    """Rises within one server process."""
    time_s: float
    """Unix time."""
    kind: str
    """run_opened, run_closed, env_joined, env_left, batch_formed, batch_nacked, step_acknowledged, committed,
    policy_published, groups_retired, tickets_voided."""
    text: str


class Finding(WireModel):
    """One thing that is wrong or will be, and what to do."""

    severity: Literal["error", "warning", "info"]
    subject: str
    """Who or what: trainer, environment NAME, inference server URL, batch, queue."""
    problem: str
    fix: str


class Diagnosis(WireModel):
    """What `atropos doctor` shows; empty when nothing is wrong."""

    findings: list[Finding]


class ErrorBody(WireModel):
    """Every error answer of the /v1 routes."""

    code: str
    detail: str
