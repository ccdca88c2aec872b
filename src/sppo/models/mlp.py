"""Policy and critic of a control task (environments/control.py): small MLPs in the places of language models.

A step of an episode is a token: its id is a row of a table that holds what was observed and what was done, and the
start's number is the prompt. So the learner, the credit, the checkpoints and the comparisons are the very same code
as for text.

`mlp:TASK,hidden=64,layers=2` as policy.model clones a teacher's successful episodes until the policy itself succeeds
in `skill` of its own (`Taught` has the options); as critic.model it is an MLP that reads the first observation (or
every one, for a token critic).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..environments.base import Reply
from ..environments.control import ControlTask, episode
from ..errors import ModelError, RecipeError
from ..spec import call, parse_spec
from ..types import Task
from .actions import Actions
from .critic import HEAD_FILE, Critic
from .mlp_episodes import episodes
from .mlp_scorer import MLP, PROBE, ControlScorer, States
from .policy import Policy
from .weights import parameter_count

SPEC, FILE = "mlp", "control.json"
UPDATES = 5000
"""Of cloning, at most."""


def is_control(name: str) -> bool:
    """Whether a model's name is of this kind: `mlp:…`, or a folder that one was saved to."""
    return name.partition(":")[0] == SPEC or (Path(name) / FILE).exists()


@dataclass(frozen=True)
class Shape:
    """The options of `mlp:TASK,…`. Raises RecipeError for values that make no sense."""

    task: str
    hidden: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        self._above_zero("hidden", "layers")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise RecipeError(f"mlp:{self.task}: {name}={getattr(self, name)} must be 1 or more")

    @classmethod
    def parse(cls, key: str, name: str) -> Self:
        """From the text of `policy.model` or `critic.model`, which `key` names."""
        spec = parse_spec(name)
        return call(cls, f"{key} = {name!r}", *spec.words, **spec.options)


@dataclass(frozen=True)
class Taught(Shape):
    """The options of a policy: also how it is taught."""

    demonstrations: int = 32
    slip: float = 0.1
    skill: float = 0.3
    """Cloning ends when this share of the policy's own episodes succeeds."""
    rate: float = 2e-4
    """Of cloning. What fails at the first false step (the hopper) wants more than 5,000 updates of the default can
    give."""
    look: int = 10
    """Updates between two looks. One takes as long as 64 episodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._above_zero("demonstrations", "look")
        if not 0 <= self.slip < 1 or not 0 < self.skill < 1 or not 0 < self.rate < 1:
            raise RecipeError(f"mlp:{self.task}: slip must lie in [0, 1), skill and rate in (0, 1)")


class ControlPolicy(Policy):
    """A policy over actions; see the module."""

    def __init__(self, net: MLP, environment: ControlTask, shape: dict[str, int], name: str) -> None:
        self.environment, self.shape, self.name = environment, shape, name
        self.scorer: Any = ControlScorer(net, environment, States(len(environment.scale), environment.size))
        self.tokenizer: Any = None
        self.chat, self.pad_id, self.eos_ids = False, 0, []
        self.adapters, self.base = None, {}
        self._divide()

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, seed: int, chat_template: str = "auto",
        adapter: Any = None, quantize: str = "",
    ) -> tuple[ControlPolicy, str]:  # fmt: skip
        """From `mlp:TASK,…`, taught, or from a folder; also returns the sentence to state."""
        if (Path(name) / FILE).exists():
            saved = json.loads((Path(name) / FILE).read_text())
            policy = cls._made(saved["task"], saved["hidden"], saved["layers"], seed, name)
            policy.model.load_state_dict(load_file(Path(name) / "model.safetensors"))
            policy.states.next = saved["next"]
            return policy, f"policy {name}: {parameter_count(policy.model)} weights, {saved['task']}"
        shape = Taught.parse("policy.model", name)
        policy = cls._made(shape.task, shape.hidden, shape.layers, seed, name)
        updates, solved = policy._clone(seed, shape)
        return policy, (
            f"policy {name}: {parameter_count(policy.model)} weights; {updates} updates on {shape.demonstrations} "
            "successful episodes of a "
            f"teacher, {solved:.0%} of its own succeed"
            + ("" if solved >= shape.skill else f": warning: skill={shape.skill} was not reached")
        )

    @classmethod
    def _made(cls, task: str, hidden: int, layers: int, seed: int, name: str) -> ControlPolicy:
        environment = ControlTask(task)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            spread = 0 if environment.actions else environment.size
            net = MLP(len(environment.scale), environment.actions or environment.size, hidden, layers, spread)
        return cls(net, environment, {"hidden": hidden, "layers": layers}, name)

    def _clone(self, seed: int, shape: Taught) -> tuple[int, float]:
        """Behaviour cloning until `skill` of 64 own episodes succeed (looked at every `look` updates, and after the
        last)."""
        env, rng, rows = self.environment, np.random.default_rng(seed), []
        start = tries = 0
        while start < shape.demonstrations:
            observation, steps = env.reset(episode(env.name, 10**6 + tries)).values, []
            for _ in range(env.kind.horizon):
                action = env.taught(rng, shape.slip)
                steps.append((observation, action))
                seen = env.step(Reply(action=action))
                observation = seen.values
                if seen.done:
                    break
            tries += 1
            if env.success():
                rows += steps
                start += 1
            elif tries > 100 * shape.demonstrations:
                raise RecipeError(f"{self.name}: the teacher succeeds too rarely with slip={shape.slip}")
        observation_ND = torch.from_numpy(np.stack([o for o, _ in rows]))
        action_NA = torch.from_numpy(np.stack([a for _, a in rows]))
        optimiser = torch.optim.Adam(self.model.parameters(), lr=shape.rate)
        generator = torch.Generator().manual_seed(seed)
        starts, solved = range(2 * 10**6, 2 * 10**6 + 64), 0.0
        for update in range(1, UPDATES + 1):
            pick = torch.randint(len(rows), (256,), generator=generator)
            loss = -self.scorer.action_logps(observation_ND[pick], action_NA[pick], 1.0)[0].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if update % shape.look == 0 or update == UPDATES:
                found = episodes(self.scorer, starts, starts, env.kind.horizon, 1.0)
                solved = sum(e.success for e in found) / len(found)
                if solved >= shape.skill:
                    break
        optimiser.zero_grad(set_to_none=True)
        return update, solved

    # -- what the loop asks ------------------------------------------------------------------------------------------

    def prompt_ids(self, task: Task) -> list[int]:
        """The number of the task's start."""
        return [int(task.columns["start"])]

    def text(self, ids: Sequence[int]) -> str:
        """What became of an episode, for the reward and for people."""
        success, length = self.states.outcomes[int(ids[0])]
        return f"{'success' if success else 'failure'} after {length} steps"

    def squared_score(self, logp_BT: Tensor) -> Tensor:
        """See `Policy`; a density does not tell how long its score is: all alike."""
        return super().squared_score(logp_BT) if self.environment.actions else torch.ones_like(logp_BT)

    def probe(self, prompt: int, response: int) -> tuple[list[int], list[int]]:
        """Fixed ids for the canary."""
        return [0], list(range(min(response, PROBE)))

    @property
    def context(self) -> int | None:
        """Episodes have no length of the model's own."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def states(self) -> States:
        """Its table of steps."""
        states: States = self.scorer.states
        return states

    def as_reference(self, saved: Path | None = None) -> Policy:
        """A frozen policy of these weights: π_ref, over the same table."""
        return self.copied()

    def copied(self) -> Policy:
        """A frozen policy with a copy of all weights."""
        frozen = copy.copy(self)
        net = copy.deepcopy(self.model).requires_grad_(False)
        frozen.scorer = ControlScorer(net, self.environment, self.states)
        return frozen

    def checkpoint_activations(self) -> None:
        """There is nothing to save in so small a model."""
        raise ModelError("training.checkpoint_activations: control policies have no layers worth it")

    def save(self, folder: Path) -> None:
        """Weights and what they are of."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")
        about = {
            "task": self.environment.name,
            **self.shape,
            "next": self.states.next,
        }  # a resumed run writes the same ids
        (folder / FILE).write_text(json.dumps(about))


class ControlCritic(Critic):
    """V of the first observation; of every one, as a token critic."""

    packs = False

    def __init__(self, task: str, hidden: int, layers: int, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        self.environment, self.shape, self.name = ControlTask(task), {"hidden": hidden, "layers": layers}, name
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = MLP(len(self.environment.scale), 1, hidden, layers)
        self.body, self.head, self.trained = net.body, net.head, False
        self.tokenizer: Any = None
        self.states: States | None = None
        self._starts: dict[int, list[float]] = {}

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, seed: int, reads: str = "prompt"
    ) -> tuple[ControlCritic, str]:
        """From `mlp:TASK,hidden=64,layers=2` or a folder."""
        if (Path(name) / FILE).exists():
            saved = json.loads((Path(name) / FILE).read_text())
            critic = cls(saved["task"], saved["hidden"], saved["layers"], seed, name)
            critic.load_state_dict(load_file(Path(name) / HEAD_FILE))
            critic.trained, critic.linear = True, saved.get("linear", False)
        else:
            shape = Shape.parse("critic.model", name)
            critic = cls(shape.task, shape.hidden, shape.layers, seed, name)
        what = "the first observation only" if reads == "prompt" else "every observation"
        return critic, f"critic {name}: {parameter_count(critic)} weights; reads {what}"

    @property
    def context(self) -> int | None:
        """Any length."""
        return None

    def reads_tokens_of(self, policy: Policy) -> None:
        """Its table of steps is the policy's."""
        if not isinstance(policy, ControlPolicy):
            raise RecipeError(f"critic.model = {self.name!r} reads control tasks only")
        self.states = policy.states

    def prompt_ids(self, task: Task) -> Any:
        """The first observation."""
        start = int(task.columns["start"])
        if start not in self._starts:
            if len(self._starts) > 10_000:
                self._starts.clear()
            self._starts[start] = self.environment.reset(task).values.tolist()
        return self._starts[start]

    def prompt_logits(self, prompts: Sequence[Sequence[float]]) -> Tensor:
        """Of first observations, [B]."""
        return self.head(self.body(torch.tensor(prompts)))[:, 0]

    def forward(self, ids_BL: Tensor, action_BL: Tensor) -> Tensor:
        """Read-outs of what was observed before each step, [B, T]."""
        assert self.states is not None
        actions = Actions.of(action_BL)
        id_BT = actions.spread(ids_BL[actions.row_N, actions.position_N])
        return self.head(self.body(self.states.rows(id_BT.flatten())[0]))[:, 0].view(id_BT.shape)

    def save(self, folder: Path) -> None:
        """Weights and what they are of."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / HEAD_FILE)
        linear = {"linear": True} if self.linear else {}
        (folder / FILE).write_text(json.dumps({"task": self.environment.name, **self.shape, **linear}))
