"""The paper's control tasks (arXiv 2604.08865 §5.3): deterministic, long, and judged once, at the end: success or not.

| name | gymnasium | horizon | success |
| --- | --- | --- | --- |
| precision-cartpole | CartPole-v1 | 200 | the final pole angle is within 0.5° |
| mountain-car | MountainCar-v0 | 1000 | the flag is reached, x ≥ 0.45 |
| hopper | Hopper-v5 | 1000 | it never falls, and ends beyond x = 1 m |
| lunar-lander | LunarLander-v3 | 1000 | it ends with both legs on the ground, \\|x\\| < 0.4 |
| pendulum | Pendulum-v1 | 1000 | it ends upright, cos θ > 0.8 |

Each has a teacher whose successful episodes a policy is cloned from until it sometimes succeeds: with this reward, nobody learns
from nothing. The paper trains its teachers on shaped rewards; these are written controllers (gymnasium's own for the lander), and for the
hopper a linear one found on the environment's shaped reward, less its bonus for being alive (benchmarks/hopper_teacher.py).
Needs the extra `control` (gymnasium with box2d and MuJoCo). This module imports neither torch nor gymnasium.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..spec import nearest
from ..types import Task
from .base import Observation, Reply

Array = np.ndarray


@dataclass(frozen=True)
class Kind:
    """What makes an environment a task: `success(env, observation, terminated)` after the last step, and what ends it early."""

    gym_id: str
    horizon: int
    scale: tuple[float, ...]
    """Observations are divided by these."""
    success: Callable[[Any, Array, bool], bool]
    teacher: Callable[[Any, Array], Any]
    reached: Callable[[Array], bool] = lambda _: False


def _cartpole(env: Any, o: Array) -> int:
    return int(0.5 * o[0] + 1.0 * o[1] + 10.0 * o[2] + 2.5 * o[3] > 0)


def _mountain_car(env: Any, o: Array) -> int:
    return 2 if o[1] >= 0 else 0


def _pendulum(env: Any, o: Array) -> Array:
    cosine, sine, speed = o
    if cosine > 0.9:
        push = -12.0 * math.atan2(sine, cosine) - 3.0 * speed
    else:  # swing up: bring the energy (θ̇²/6 + 5·cos θ, 5 when upright and at rest) to the top's
        push = 2.0 * math.copysign(1.0, speed * (5.0 - (speed * speed / 6.0 + 5.0 * cosine)) or 1.0)
    return np.array([min(max(push, -2.0), 2.0)], dtype=np.float32)


def _lander(env: Any, o: Array) -> int:
    from gymnasium.envs.box2d.lunar_lander import heuristic

    return int(heuristic(env, o))


_HOPPER = np.array([
    [0.578, -5.041, -1.393, -0.249, 0.36, 0.266, -0.006, -0.609, -0.181, 0.002, -0.006, -1.868],
    [-0.772, -2.557, -0.622, -1.11, -0.148, -0.222, 0.16, -0.97, -0.053, -0.169, 0.011, 0.559],
    [2.569, -7.335, 0.9, 0.922, -0.191, -0.554, -0.048, -0.51, 0.283, 0.019, 0.064, -1.814],
])  # fmt: skip
"""The hopper's torques: eleven weights of what is observed and a constant each."""


def _hopper(env: Any, o: Array) -> Array:
    return np.clip(_HOPPER[:, :-1] @ o + _HOPPER[:, -1], -1.0, 1.0)


KINDS = {
    "precision-cartpole": Kind(
        "CartPole-v1", 200, (1.2, 1.0, 0.1, 1.0),
        lambda env, o, ended: not ended and abs(float(o[2])) <= math.radians(0.5), _cartpole,
    ),
    "mountain-car": Kind(
        "MountainCar-v0", 1000, (0.6, 0.035), lambda env, o, ended: bool(o[0] >= 0.45), _mountain_car, lambda o: bool(o[0] >= 0.45)
    ),
    "hopper": Kind(
        "Hopper-v5", 1000, (1.0,) * 5 + (3.0,) * 6, lambda env, o, ended: not ended and float(env.data.qpos[0]) > 1.0, _hopper
    ),
    "lunar-lander": Kind(
        "LunarLander-v3", 1000, (1.0,) * 8,
        lambda env, o, ended: bool(o[6] > 0.5 and o[7] > 0.5 and abs(o[0]) < 0.4), _lander,
    ),
    "pendulum": Kind("Pendulum-v1", 1000, (1.0, 1.0, 4.0), lambda env, o, ended: bool(o[0] > 0.8), _pendulum),
}  # fmt: skip


def episode(name: str, start: int) -> Task:
    """The episode of a control task that begins at start number `start`."""
    return Task(f"{name}/{start}", f"{name} from start {start}", {"start": start})


class ControlTask:
    """One control task: an `Environment` whose observations are arrays (`values`) and whose replies are actions.

    `actions` is their number, or 0 for continuous ones of `size`.
    """

    def __init__(self, name: str) -> None:
        if name not in KINDS:
            raise RecipeError(f"unknown control task {name!r}: {nearest(name, list(KINDS))}")
        try:
            import gymnasium
        except ImportError:
            raise RecipeError("control tasks need the control extra: pip install 'sppo[control]'") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # Box2D's bindings warn as they are imported, and crash where warnings are errors
                self.env = gymnasium.make(KINDS[name].gym_id).unwrapped
        except gymnasium.error.DependencyNotInstalled as error:
            raise RecipeError(f"{name} needs the control extra ({error}): pip install 'sppo[control]'") from None
        self.name, self.kind = name, KINDS[name]
        self.scale = np.asarray(self.kind.scale, dtype=np.float32)
        space: Any = self.env.action_space
        self.actions = int(getattr(space, "n", 0))
        self.size = 1 if self.actions else int(space.shape[0])
        self.limits: tuple[Any, Any] = (0, 0) if self.actions else (space.low, space.high)
        self.last = np.zeros(len(self.scale), dtype=np.float32)
        self.ended = False

    def reset(self, task: Task) -> Observation:
        """The scaled first observation of the episode that begins at the task's start."""
        self.last = np.asarray(self.env.reset(seed=int(task.columns["start"]))[0], dtype=np.float32)
        self.ended = False
        return Observation(values=self.last / self.scale)

    def step(self, reply: Reply) -> Observation:
        """The next scaled observation, and whether the episode has ended."""
        action: Array = reply.action
        chosen = int(action[0]) if self.actions else np.clip(action, *self.limits)
        observation, _, terminated, _, _ = self.env.step(chosen)
        self.last = np.asarray(observation, dtype=np.float32)
        self.ended = bool(terminated)
        over = self.ended or self.kind.reached(self.last)
        return Observation(values=self.last / self.scale, done=over)

    def close(self) -> None:
        """The simulator is kept: making one takes its time."""

    def success(self) -> bool:
        """Whether the episode that ends here is one."""
        return self.kind.success(self.env, self.last, self.ended)

    def taught(self, rng: np.random.Generator, slip: float) -> Array:
        """What the teacher would do now; with probability `slip` anything else."""
        if rng.random() < slip:
            self.env.action_space.seed(int(rng.integers(2**31)))
            return np.atleast_1d(self.env.action_space.sample()).astype(np.float32)
        return np.atleast_1d(self.kind.teacher(self.env, self.last)).astype(np.float32)
