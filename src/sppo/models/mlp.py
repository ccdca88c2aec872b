"""Policy and critic of a control task (environments.py): small MLPs in the places of language models.

A step of an episode is a token: its id is a row of a table that holds what was observed and what was done, and the start's number is the
prompt. So the learner, the credit, the checkpoints and the comparisons are the very same code as for text.

`mlp:TASK,hidden=64,layers=2` as policy.model clones a teacher's successful episodes until the policy itself succeeds in
`skill` of its own (`Taught` has the options); as critic.model it is an MLP that reads the first observation (or every one, for a token critic).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..environments.control import Environment
from ..errors import ModelError, RecipeError
from ..spec import call, parse_spec
from ..types import Task
from .critic import HEAD_FILE, Critic
from .policy import Policy, ResponseLogps, parameter_count

SPEC, FILE = "mlp", "control.json"
PROBE = 8
"""Rows of the table that hold fixed observations, for the engine's canary."""
UPDATES = 5000
"""Of cloning, at most."""
KEEP = 4
"""Calls of the engine whose steps are held."""


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
    """Those of a policy: also how it is taught."""

    demonstrations: int = 32
    slip: float = 0.1
    skill: float = 0.3
    """Cloning ends when so many of the policy's own episodes succeed."""
    rate: float = 2e-4
    """Of cloning. What fails at the first false step (the hopper) wants more than 5,000 updates of the default can give."""
    look: int = 10
    """Updates between two looks. One takes as long as 64 episodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._above_zero("demonstrations", "look")
        if not 0 <= self.slip < 1 or not 0 < self.skill < 1 or not 0 < self.rate < 1:
            raise RecipeError(f"mlp:{self.task}: slip must lie in [0, 1), skill and rate in (0, 1)")


class States:
    """Observations and actions by id. Ids only grow; those of the last `KEEP` blocks are held, and the probe's always."""

    def __init__(self, observations: int, actions: int) -> None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(PROBE, observations, generator=generator), torch.zeros(PROBE, actions)
        self.blocks: list[tuple[Tensor, Tensor]] = [probe]
        self.next, self.outcomes = PROBE, dict[int, tuple[bool, int]]()
        self._table = probe

    def add(self, observation_ND: Tensor, action_NA: Tensor, ends: Sequence[tuple[int, bool]]) -> int:
        """Rows for the steps of whole episodes, one after the other; `ends` are their lengths and outcomes. Returns the first id."""
        self.blocks = [self.blocks[0], *self.blocks[1:][-KEEP + 1 :], (observation_ND, action_NA)]
        first = self.next
        self.next += len(observation_ND)
        self._table = torch.cat([b[0] for b in self.blocks]), torch.cat([b[1] for b in self.blocks])
        self.outcomes = {i: o for i, o in self.outcomes.items() if i >= self.oldest}
        at = first
        for length, success in ends:
            self.outcomes[at] = (success, length)
            at += length
        return first

    @property
    def oldest(self) -> int:
        """The first id that is held, the probe's apart."""
        return self.next - (len(self._table[0]) - PROBE)

    def rows(self, id_N: Tensor) -> tuple[Tensor, Tensor]:
        """Observations and actions, [N, D] and [N, A]. Raises IndexError for ids that are no longer held."""
        at_N = torch.where(id_N < PROBE, id_N, id_N - self.oldest + PROBE)
        if bool(((id_N >= PROBE) & (id_N < self.oldest)).any()):
            raise IndexError("steps of an episode that is no longer held")
        return self._table[0][at_N], self._table[1][at_N]


class MLP(nn.Module):
    """Tanh layers; the last one's gain is small, so that a fresh policy is nearly uniform."""

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int, spread: int = 0) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * layers]
        self.body = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(hidden, outputs)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.log_std = nn.Parameter(torch.full((spread,), -0.5)) if spread else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits, means, or a value's logit."""
        return self.head(self.body(x))


class ControlPolicy(Policy):
    """A policy over actions; see the module."""

    def __init__(self, net: MLP, environment: Environment, shape: dict[str, int], name: str) -> None:
        self.model: Any = net.eval()
        self.environment, self.shape, self.name = environment, shape, name
        self.states = States(len(environment.scale), environment.size)
        self.tokenizer: Any = None
        self.chat, self.packs, self.unpacked_why, self.pad_id, self.eos_ids = False, True, "", 0, []
        self._checkpointed = []

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, seed: int, chat_template: str = "auto"
    ) -> tuple[ControlPolicy, str]:
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
            f"policy {name}: {parameter_count(policy.model)} weights; {updates} updates on {shape.demonstrations} successful episodes of a "
            f"teacher, {solved:.0%} of its own succeed"
            + ("" if solved >= shape.skill else f": warning: skill={shape.skill} was not reached")
        )

    @classmethod
    def _made(cls, task: str, hidden: int, layers: int, seed: int, name: str) -> ControlPolicy:
        environment = Environment(task)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            spread = 0 if environment.actions else environment.size
            net = MLP(len(environment.scale), environment.actions or environment.size, hidden, layers, spread)
        return cls(net, environment, {"hidden": hidden, "layers": layers}, name)

    def _clone(self, seed: int, shape: Taught) -> tuple[int, float]:
        """Behaviour cloning until `skill` of 64 own episodes succeed (looked at every `look` updates, and after the last)."""
        env, rng, rows = self.environment, np.random.default_rng(seed), []
        start = tries = 0
        while start < shape.demonstrations:
            observation, steps = env.reset(10**6 + tries), []
            for _ in range(env.kind.horizon):
                action = env.taught(rng, shape.slip)
                steps.append((observation, action))
                observation, ended = env.step(action)
                if ended:
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
            loss = -self.action_logps(observation_ND[pick], action_NA[pick], 1.0)[0].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if update % shape.look == 0 or update == UPDATES:
                found = episodes(self, starts, starts, env.kind.horizon, 1.0)
                solved = sum(e.success for e in found) / len(found)
                if solved >= shape.skill:
                    break
        optimiser.zero_grad(set_to_none=True)
        return update, solved

    # -- what the loop asks ------------------------------------------------------------------------------------------

    def action_logps(self, observation_ND: Tensor, action_NA: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log π of given actions, [N], and the entropies, [N] (without gradient). A Gaussian's variance is multiplied by the temperature."""
        out = self.model(observation_ND)
        if self.environment.actions:
            logp_NK = torch.log_softmax(out / temperature, -1)
            entropy_N = -(logp_NK.exp() * logp_NK).sum(-1)
            return logp_NK.gather(1, action_NA.long())[:, 0], entropy_N.detach()
        log_std = self.model.log_std + 0.5 * math.log(temperature)
        z = (action_NA - out) / log_std.exp()
        logp_N = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().detach()
        return logp_N, entropy.expand_as(logp_N)

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

    def response_logps(
        self, ids_BL: Tensor, prompt_len_B: Tensor, response_len_B: Tensor, temperature: float
    ) -> ResponseLogps:
        """See `Policy`; ids are rows of `states`."""
        mask_BT = torch.arange(int(response_len_B.max()))[None] < response_len_B[:, None]
        row_N, t_N = mask_BT.nonzero(as_tuple=True)
        observation_ND, action_NA = self.states.rows(ids_BL[row_N, prompt_len_B[row_N] + t_N])
        logp_N, entropy_N = self.action_logps(observation_ND, action_NA, temperature)
        blank = torch.zeros(mask_BT.shape)
        return ResponseLogps(blank.index_put((row_N, t_N), logp_N), blank.index_put((row_N, t_N), entropy_N), mask_BT)

    def probe(self, prompt: int, response: int) -> tuple[list[int], list[int]]:
        """Fixed ids for the canary."""
        return [0], list(range(min(response, PROBE)))

    @property
    def context(self) -> int | None:
        """Episodes have no length of the model's own."""
        return None

    def reference(self) -> Policy:
        """A frozen copy: π_ref, over the same table."""
        frozen = ControlPolicy.__new__(ControlPolicy)
        frozen.__dict__.update(self.__dict__)
        frozen.model = copy.deepcopy(self.model).requires_grad_(False).eval()
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


@dataclass
class Episode:
    """One episode: what was observed, done, and how likely that was."""

    observations: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    success: bool = False


_environments: dict[str, list[Environment]] = {}
"""Made once a process: a physics engine takes its time."""


@torch.inference_mode()
def episodes(
    policy: ControlPolicy, starts: Sequence[int], seeds: Sequence[int], horizon: int, temperature: float
) -> list[Episode]:
    """One episode from each start, all its randomness from its seed; temperature 0 takes the likeliest action."""
    held = _environments.setdefault(policy.environment.name, [])
    while len(held) < len(starts):
        held.append(Environment(policy.environment.name))
    found, live = [Episode() for _ in starts], list(range(len(starts)))
    now = [held[i].reset(start) for i, start in enumerate(starts)]
    noise = [_noise(policy, seed, horizon) for seed in seeds]
    for t in range(horizon):
        observed = torch.from_numpy(np.stack([now[i] for i in live]))
        action_NA = _act(policy, observed, torch.from_numpy(np.stack([noise[i][t] for i in live])), temperature)
        logp_N = policy.action_logps(observed, action_NA, temperature or 1.0)[0].tolist()
        going = []
        for n, (i, action) in enumerate(zip(live, action_NA.numpy(), strict=True)):
            episode = found[i]
            episode.observations.append(now[i])
            episode.actions.append(action)
            episode.logps.append(logp_N[n])
            now[i], ended = held[i].step(action)
            if ended or t + 1 == horizon:
                episode.success = held[i].success()
            else:
                going.append(i)
        live = going
        if not live:
            break
    return found


def _noise(policy: ControlPolicy, seed: int, horizon: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=seed))
    draw = rng.random if policy.environment.actions else rng.standard_normal
    return draw((horizon, policy.environment.size), dtype=np.float32)


def _act(policy: ControlPolicy, observed: torch.Tensor, noise_NA: torch.Tensor, temperature: float) -> torch.Tensor:
    out = policy.model(observed)
    if not policy.environment.actions:
        return out + noise_NA * policy.model.log_std.exp() * temperature**0.5
    if temperature == 0:
        return out.argmax(-1, keepdim=True).float()
    # the inverse of the distribution function; rounding must not lead past the last action
    beyond = torch.softmax(out / temperature, -1).cumsum(-1) < noise_NA
    return beyond.sum(-1, keepdim=True).clamp(max=policy.environment.actions - 1).float()


class ControlCritic(Critic):
    """V of the first observation; of every one, as a token critic."""

    def __init__(self, task: str, hidden: int, layers: int, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        self.environment, self.shape, self.name = Environment(task), {"hidden": hidden, "layers": layers}, name
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
            self._starts[start] = self.environment.reset(start).tolist()
        return self._starts[start]

    def forward(self, prompts: Sequence[Sequence[float]]) -> Tensor:
        """Logits, [B]."""
        return self.head(self.body(torch.tensor(prompts)))[:, 0]

    def token_logits(self, ids_BL: Tensor, prompt_len_B: Tensor, response_len_B: Tensor) -> Tensor:
        """Read-outs of what was observed before each step, [B, T]."""
        assert self.states is not None
        at_BT = prompt_len_B[:, None] + torch.arange(int(response_len_B.max()))
        inside_BT = torch.arange(at_BT.size(1)) < response_len_B[:, None]
        id_BT = torch.where(inside_BT, ids_BL.gather(1, at_BT.clamp(max=ids_BL.size(1) - 1)), 0)
        return self.head(self.body(self.states.rows(id_BT.flatten())[0]))[:, 0].view(id_BT.shape)

    def save(self, folder: Path) -> None:
        """Weights and what they are of."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / HEAD_FILE)
        linear = {"linear": True} if self.linear else {}
        (folder / FILE).write_text(json.dumps({"task": self.environment.name, **self.shape, **linear}))
