"""The folder of one run: what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. Its name is the id of the run."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, name: str) -> RunFolder:
        """Make RUNS_DIR/NAME, or NAME-2, NAME-3, ... where earlier runs took the name."""
        runs_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = runs_dir / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            folder = cls(path)
            folder.logs.mkdir()
            return folder

    @property
    def run_id(self) -> str:
        """Unique among the runs of a runs_dir."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def trainer_config(self) -> Path:
        """What the trainer is started with; its own trainer_resolved.yaml holds every option with its value."""
        return self.path / "trainer_launch.yaml"

    @property
    def logs(self) -> Path:
        """One log file for each process."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """Starts, deaths, restarts."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a step, by the trainer."""
        return self.path / "metrics.jsonl"

    @property
    def env_metrics(self) -> Path:
        """Sampling throughput and counters, by the environments."""
        return self.path / "env_metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Sample rollouts in text."""
        return self.path / "rollouts.jsonl"

    @property
    def ledger(self) -> Path:
        """Which groups were delivered, and which were trained."""
        return self.path / "ledger"

    @property
    def server_ledger(self) -> Path:
        """The rollout server's records of all groups, saved when the run ends."""
        return self.ledger / "server.json"

    @property
    def mock_model(self) -> Path:
        """The model of a run that has no real one."""
        return self.path / "mock"

    @property
    def checkpoints(self) -> Path:
        """The trainer's output_dir."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model, loadable by transformers."""
        return self.path / "final"

    @property
    def summary(self) -> Path:
        """What came of it, for programs. Its presence says that the run is over."""
        return self.path / "summary.json"

    @property
    def has_checkpoint(self) -> bool:
        """The trainer has saved at least once."""
        return any(self.checkpoints.glob("checkpoint-*"))

    @property
    def has_final(self) -> bool:
        """Training is over and its model saved."""
        return (self.final / "config.json").is_file() and any(self.final.glob("*.safetensors"))

    def evaluation(self, phase: str) -> Path:
        """Results of the held-out evaluation, phase before or after."""
        return self.path / "eval" / phase

    def has_evaluation(self, phase: str) -> bool:
        """The evaluation of this phase has left its results."""
        return any(self.evaluation(phase).rglob("metrics.json"))
