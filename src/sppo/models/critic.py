"""The critic: V(x) = σ(c(x)), the predicted chance that the policy solves prompt x. It reads the prompt only.

It is decoupled from the policy (arXiv 2604.08865): any transformers decoder or encoder, any size, its own tokenizer.
c is a linear read-out of the last hidden state at the prompt's last real token. The read-out's weights start at 0 and its
bias at logit(base success rate), so V starts at the base rate for every prompt, and the first advantages are R − mean. A critic that learns by squared
error (`objective.value_loss = "squared"`, PPO's) is linear: V(x) = c(x), and its bias starts at the base rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..files import readable
from ..objective.ratio import wide
from ..types import Task
from .loading import choose_dtype, embedded, ensure_pad, load, prompt_ids, render_chat
from .policy import Policy, _count, parameter_count

HEAD_FILE = "value_head.safetensors"


class Critic(nn.Module):
    """A backbone and a scalar head. `save` writes a folder that `AutoModel.from_pretrained` loads, the head beside it."""

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
            critic = cls(backbone.to(dtype=chosen), tokenizer, name=name)
            if trained.exists():
                critic.head.load_state_dict(load_file(trained))
                critic.trained = True
                with safe_open(trained, "pt") as file:
                    critic.linear = (file.metadata() or {}).get("value") == "linear"
        return critic.to(device), (
            f"critic {name}: {_count(parameters)} parameters in {str(chosen).removeprefix('torch.')} ({why}); reads "
            + ("the prompt only" if reads == "prompt" else "prompt and response: a value for every token")
        )

    def reads_out(self, *, linear: bool) -> None:
        """What the read-out is to be: the value itself, or the logit of a chance. Raises RecipeError for one that was trained to be the other."""
        if self.trained and self.linear != linear:
            was, mend = ("squared error", "squared") if self.linear else ("cross-entropy", "cross-entropy")
            raise RecipeError(
                f"critic.model = {self.name!r} was trained by {was}, and its read-out means something else to this recipe: set objective.value_loss = {mend!r} "
                "(with objective.baseline = 'token-critic'), or begin with another critic"
            )
        self.linear = linear

    def value(self, readout: Tensor) -> Tensor:
        """V from the read-out, same shape."""
        return readout if self.linear else readout.sigmoid()

    @torch.no_grad()
    def start_at(self, base_rate: float) -> None:
        """Zero read-out, and a bias such that V(x) is the base success rate for every prompt. A trained critic is left alone."""
        if self.trained:
            return
        rate = min(max(base_rate, 0.01), 0.99)
        self.head.weight.zero_()
        self.head.bias.fill_(rate if self.linear else math.log(rate / (1 - rate)))

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

    def prompt_ids(self, task: Task) -> list[int]:
        """The prompt through the critic's own tokenizer (and chat template, if it has one)."""
        ids = prompt_ids(self.tokenizer, task, bool(getattr(self.tokenizer, "chat_template", None)))
        return embedded(ids, self.backbone, "critic.model")

    def refuses(self, task: Task) -> str | None:
        """Why the critic's own template refuses a prompt, or None."""
        if isinstance(task.prompt, str) or not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            render_chat(self.tokenizer, task)
        except ModelError as error:
            return f"{str(error).removeprefix(f'task {task.id}: ')} (critic.model)"
        return None

    def forward(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits c(x), [B] in float32, for prompts given as ids; right-padded, read at the last real token."""
        device = self.head.weight.device
        length_B = torch.tensor([len(p) for p in prompts], device=device)
        ids_BP = torch.full((len(prompts), int(length_B.max())), self.tokenizer.pad_token_id or 0)
        for row, prompt in zip(ids_BP, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids_BP = ids_BP.to(device)
        mask_BP = (torch.arange(ids_BP.size(1), device=device)[None] < length_B[:, None]).long()
        hidden_BPD = self.backbone(input_ids=ids_BP, attention_mask=mask_BP, **self._no_cache).last_hidden_state
        last_BD = hidden_BPD[torch.arange(len(prompts), device=device), length_B - 1]
        return self.head(wide(last_BD))[:, 0]

    def reads_tokens_of(self, policy: Policy) -> None:
        """Make sure that the policy's ids mean to this critic what they mean to the policy. Raises RecipeError when they do not."""
        if self.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise RecipeError(
                f"objective.baseline = 'token-critic' reads the response, so critic.model ({self.name}) must have the policy's own "
                "tokenizer: give it the policy's model or a smaller one of its family"
            )

    def token_logits(self, ids_BL: Tensor, prompt_len_B: Tensor, response_len_B: Tensor) -> Tensor:
        """Read-outs of the state *before* each response token, [B, T] in float32: PPO's values, and no prompt-only critic's.

        Args:
            ids_BL: prompt, response, padding on the right. What lies beyond a response comes out as anything.
        """
        device = self.head.weight.device
        ids_BL, length_B = ids_BL.to(device), (prompt_len_B + response_len_B).to(device)
        mask_BL = (torch.arange(ids_BL.size(1), device=device)[None] < length_B[:, None]).long()
        hidden_BLD = self.backbone(input_ids=ids_BL, attention_mask=mask_BL, **self._no_cache).last_hidden_state
        at_BT = prompt_len_B.to(device)[:, None] - 1 + torch.arange(int(response_len_B.max()), device=device)[None]
        at_BT = at_BT.clamp(max=ids_BL.size(1) - 1)
        return self.head(wide(hidden_BLD.gather(1, at_BT[..., None].expand(-1, -1, hidden_BLD.size(-1)))))[..., 0]

    @torch.no_grad()
    def logits(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """c(x) for tasks, [B] on the CPU, in batches of similar length and at most so many tokens."""
        prompts = [self.prompt_ids(t) for t in tasks]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        out_B = torch.zeros(len(prompts))
        while order:
            part = order[: max(1, token_budget // len(prompts[order[0]]))]
            order = order[len(part) :]
            out_B[part] = self([prompts[i] for i in part]).cpu()
        return out_B

    def chances(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """The predicted chances to solve tasks, [B] on the CPU: V(x), within [0, 1]."""
        return self.value(self.logits(tasks, token_budget)).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Backbone and tokenizer as `AutoModel`/`AutoTokenizer` load them; the value head beside them."""
        self.backbone.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        weights = {k: v.contiguous() for k, v in self.head.state_dict().items()}
        save_file(weights, folder / HEAD_FILE, metadata={"value": "linear"} if self.linear else None)
