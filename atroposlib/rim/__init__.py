"""RIM, the reward interpretation model: judge models that pay a trajectory and say why."""

from atroposlib.rim.config import RIMConfig
from atroposlib.rim.result import RIMResult
from atroposlib.rim.reward import RIMReward
from atroposlib.rim.trajectory import Trajectory

__all__ = ["RIMConfig", "RIMResult", "RIMReward", "Trajectory"]
