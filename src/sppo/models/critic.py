"""The critic: V(x) = σ(c(x)), the predicted chance that the policy solves prompt x. It reads the prompt only.

It is decoupled from the policy (arXiv 2604.08865): any transformers decoder or encoder, any size, its own tokenizer.
c is a linear read-out of the last hidden state at the prompt's last real token. The read-out's weights start at 0 and
its bias at logit(base success rate), so V starts at the base rate for every prompt, and the first advantages are R −
mean. A critic that learns by squared error (`objective.value_loss = "squared"`, PPO's) is linear: V(x) = c(x), and
its bias starts at the base rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..distributed.fsdp import put_together
from ..distributed.mesh import Mesh
from ..errors import ModelError, RecipeError
from ..files import readable
from ..objective.ratio import wide
from ..types import Task
from .actions import Actions
from .loading import LARGE, choose_dtype, embedded, ensure_pad, load, prompt_ids, render_chat
from .policy import Policy
from .scorer import Reader, nothing_of
from .weights import cast, counted, parameter_count

HEAD_FILE = "value_head.safetensors"


class Critic(nn.Module):
    """A backbone and a scalar head. `save` writes a folder that `AutoModel.from_pretrained` loads, the head beside
    it."""

    mesh = Mesh()
    """The ranks that hold it; sharding.py sets it."""
    linear = False
    """Whether its read-out is the value itself, not the logit of a chance."""

    def __init__(self, backbone: Any, tokenizer: Any, *, name: str = "critic") -> None:
        super().__init__()
        if backbone.config.is_encoder_decoder:
            raise ModelError(
                f"critic.model: {name} is an encoder-decoder; take an encoder (BERT-like) or a decoder (Llama-like)"
            )
        if backbone.get_output_embeddings() is not None:  # a causal LM was given: its head is of no use here
            backbone = backbone.base_model
        ensure_pad(tokenizer, f"critic.model: {name}")
        self.backbone = backbone.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trained = False

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, seed: int, reads: str = "prompt"
    ) -> tuple[Critic, str]:
        """Load `critic.model` (with its trained head, if the folder has one); also returns the sentence to state."""
        backbone, tokenizer = load(name, role="critic.model", head=False, seed=seed)
        parameters = parameter_count(backbone)
        chosen, why = choose_dtype(dtype, parameters, device)
        trained = Path(name).expanduser() / HEAD_FILE
        with readable(f"critic.model: {name} cannot be used", ModelError):
            critic = cls(cast(backbone, chosen), tokenizer, name=name)
            if trained.exists():
                critic.load_head(trained.parent)
        return critic.to(device), (
            f"critic {name}: {counted(parameters)} parameters in {str(chosen).removeprefix('torch.')} ({why}); reads "
            + ("the prompt only" if reads == "prompt" else "prompt and response: a value for every token")
        )

    def reads_out(self, *, linear: bool) -> None:
        """What the read-out is to be: the value itself, or the logit of a chance. Raises RecipeError for one that was
        trained to be the other."""
        if self.trained and self.linear != linear:
            was, mend = ("squared error", "squared") if self.linear else ("cross-entropy", "cross-entropy")
            raise RecipeError(
                f"critic.model = {self.name!r} was trained by {was}, and its read-out means something else to this "
                f"recipe: set objective.value_loss = {mend!r} "
                "(with objective.baseline = 'token-critic'), or begin with another critic"
            )
        self.linear = linear

    def value(self, readout: Tensor) -> Tensor:
        """V from the read-out, same shape."""
        return readout if self.linear else readout.sigmoid()

    @torch.no_grad()
    def start_at(self, base_rate: float) -> None:
        """Zero read-out, and a bias such that V(x) is the base success rate for every prompt. A trained critic is
        left alone."""
        if self.trained:
            return
        rate = min(max(base_rate, 0.01), 0.99)
        self.head.weight.zero_()
        self.head.bias.fill_(rate if self.linear else math.log(rate / (1 - rate)))

    @cached_property
    def reader(self) -> Reader:
        """What its passes are computed by: packed and fused from `LARGE` on, where that saves something."""
        return Reader(
            self.backbone, fast=parameter_count(self.backbone) >= LARGE
        )  # cached, and so no part of this module

    @property
    def packs(self) -> bool:
        """Whether no padding is computed."""
        return bool(self.reader.packs)

    def checkpoint_activations(self) -> None:
        """From now on training passes keep only the layers' inputs, and compute the layers again in the backward pass,
        where the backbone has layers for it."""
        self.reader.checkpoint_activations()

    @property
    def _no_cache(self) -> dict[str, bool]:
        """Decoders would keep keys and values that nobody reads."""
        return {"use_cache": False} if getattr(self.backbone.config, "use_cache", None) is not None else {}

    @property
    def context(self) -> int | None:
        """The longest prompt the backbone can read, or None when its config does not say."""
        limits = [getattr(self.backbone.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        # RoBERTa declares two positions more than it can use; its tokenizer knows. Tokenizers without a limit say 1e30.
        known = [n for n in limits if n is not None and 0 < n < 1e9]
        return int(min(known)) if known else None

    @property
    def embeddings(self) -> int:
        """Ids that can be read."""
        rows: int = self.backbone.get_input_embeddings().weight.size(0)
        return rows

    def prompt_ids(self, task: Task) -> list[int]:
        """The prompt through the critic's own tokenizer (and chat template, if it has one)."""
        ids = prompt_ids(self.tokenizer, task, bool(getattr(self.tokenizer, "chat_template", None)))
        return embedded(ids, self.embeddings, "critic.model")

    def refuses(self, task: Task) -> str | None:
        """Why the critic's own template refuses a prompt, or None."""
        if isinstance(task.prompt, str) or not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            render_chat(self.tokenizer, task)
        except ModelError as error:
            return f"{str(error).removeprefix(f'task {task.id}: ')} (critic.model)"
        return None

    def forward(self, ids_BL: Tensor, action_BL: Tensor) -> Tensor:
        """Read-outs of the state *before* each action token, [B, T] in float32: a value that has not seen the token.
        Undefined beyond a row's actions.

        Args:
            ids_BL: rows of tokens, padded on the right; an action itself is not read where none follows it.
            action_BL: True for the tokens to predict before.
        """
        if not len(ids_BL):
            return nothing_of(self)
        actions = Actions.of(action_BL.cpu())
        readout_N = self.head(wide(self.hidden(ids_BL, action_BL.cpu())))[:, 0]
        return actions.to(readout_N.device).spread(readout_N)

    def hidden(self, ids_BL: Tensor, action_BL: Tensor) -> Tensor:
        """The backbone's last hidden states before N action tokens, [N, D]."""
        actions = Actions.of(action_BL)
        if self.packs:
            return self.reader.states(ids_BL.cpu(), actions)
        device = self.head.weight.device
        width = int(actions.before_B.max())
        ids_BL = ids_BL[:, :width].to(device)
        mask_BL = (torch.arange(width)[None] < actions.before_B[:, None]).long().to(device)
        with self.reader.computing():
            hidden_BLD = self.backbone(input_ids=ids_BL, attention_mask=mask_BL, **self._no_cache).last_hidden_state
        return hidden_BLD[actions.row_N.to(device), actions.position_N.to(device) - 1]

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """c(x), [B] in float32, for prompts given as ids: the read-out at each one's last token, before whatever is
        the answer's first."""
        width = max(map(len, prompts), default=1) + 1
        ids_BL = torch.full((len(prompts), width), self.tokenizer.pad_token_id or 0)
        action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            ids_BL[b, : len(prompt)] = torch.tensor(prompt)
            action_BL[b, len(prompt)] = True
        return self(ids_BL, action_BL)[:, 0]

    def reads_tokens_of(self, policy: Policy) -> None:
        """Make sure that the policy's ids mean to this critic what they mean to the policy. Raises RecipeError when
        they do not."""
        if self.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise RecipeError(
                f"objective.baseline = 'token-critic' reads the response, so critic.model ({self.name}) must have "
                "the policy's own "
                "tokenizer: give it the policy's model or a smaller one of its family"
            )

    @torch.no_grad()
    def logits(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """c(x) for tasks, [B] on the CPU, in batches of similar length and up to `token_budget` tokens. All ranks must ask for the same
        tasks; they divide the work, and each gets all of it."""
        prompts = [self.prompt_ids(t) for t in tasks]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)

        def cut(order: list[int]) -> list[list[int]]:
            parts = []
            while order:
                parts.append(order[: max(1, token_budget // len(prompts[order[0]]))])
                order = order[len(parts[-1]) :]
            return parts

        out_B = torch.zeros(len(prompts))
        for part in self.mesh.dealt(order, cut, list):
            out_B[part] = self.prompt_logits([prompts[i] for i in part]).cpu().to(out_B.dtype)
        return self.mesh.sum(out_B)

    def chances(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """The predicted chances to solve tasks, [B] on the CPU: V(x), within [0, 1]."""
        return self.value(self.logits(tasks, token_budget)).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Backbone and tokenizer as `AutoModel`/`AutoTokenizer` load them; the value head beside them. All ranks must call it; the first
        writes."""
        first = self.mesh.rank == 0
        with put_together(self, first):
            if not first:
                return
            self.backbone.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_head(folder)

    def save_head(self, folder: Path) -> None:
        """Write the read-out beside the rest."""
        weights = {k: v.contiguous() for k, v in self.head.state_dict().items()}
        save_file(weights, folder / HEAD_FILE, metadata={"value": "linear"} if self.linear else None)

    def load_head(self, folder: Path) -> None:
        """Take a trained read-out from a folder."""
        self.head.load_state_dict(load_file(folder / HEAD_FILE))
        self.trained = True
        with safe_open(folder / HEAD_FILE, "pt") as file:
            self.linear = (file.metadata() or {}).get("value") == "linear"
