"""The sections of a recipe, in the order in which data flows: every key with its default, bounds and help text.

Rules that compare several keys are in checks.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..spec import named_columns, split_specs

Dtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicySection(Section):
    """The model that is trained."""

    model: str = Field("tiny", description="a folder, a hub name, or 'tiny:hidden=128,layers=3,heads=4' (from scratch)")
    dtype: Dtype = Field(
        "auto",
        description="weights in rollouts and updates; auto: bfloat16 from 50M parameters on where the hardware "
        "multiplies it natively, else float32 (master weights, head and log-softmax are always float32)",
    )
    chat_template: Literal["auto", "off"] = Field(
        "auto", description="auto: chat messages go through the tokenizer's template if it has one; off: plain text"
    )
    quantize: Literal["", "nf4", "int8"] = Field(
        "", description="hold the frozen weights under [adapter] in 4 or 8 bits (bitsandbytes); '': in policy.dtype"
    )


class AdapterSection(Section):
    """Train low-rank matrices beside frozen weights (LoRA, by peft); without this section all weights are trained."""

    rank: int = Field(16, ge=1, description="rank of each matrix")
    alpha: int = Field(32, ge=1, description="its product is multiplied by alpha / rank")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="which layers get one: 'all-linear' (all but the head), or names, e.g. ['q_proj', 'v_proj']",
    )
    rslora: bool = Field(False, description="multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = Field(False, description="also train the length of each row of the sum (arXiv 2402.09353); slower")


class CriticSection(Section):
    """The prompt-only value model V(x): any family, any size, its own tokenizer."""

    model: str = Field(
        "tiny:hidden=64,layers=2,heads=4",
        description="as policy.model, an encoder or a decoder; 'policy': a second adapter on the policy's frozen weights",
    )
    dtype: Dtype = Field("auto", description="as policy.dtype")


class TaskSection(Section):
    """Which problems."""

    train: str = Field(
        "chain:steps=4-6",
        description="training problems: 'name:key=value,…', or a file of rows (.jsonl, .json, .csv, .tsv, .parquet), "
        "absolute or relative to the recipe",
    )
    eval: str | None = Field(None, description="held-out problems; default: a held-out share of the training problems")
    columns: dict[str, str] | None = Field(
        None, description="which column of the rows to use under which name, e.g. prompt=q,answer=meta.gold"
    )
    instruction: str = Field("", description="text added after every question, e.g. how to mark the answer")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are left out and counted, never cut")

    @field_validator("columns", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        return named_columns(value) if isinstance(value, str) else value


class EnvironmentSection(Section):
    """What answers the policy between its turns."""

    use: str = Field(
        "single_turn",
        description="'single_turn' (nothing: one answer), or package.module:object; leave it out with tools",
    )
    tools: tuple[str, ...] = Field(
        (),
        description="what the policy may call: modules of tools/ ('calculator'), or package.module:object, a function or a class",
    )
    turns: int = Field(8, ge=1, description="tools: turns of the policy, at most")
    output: int = Field(4000, ge=40, description="tools: characters of a result that are shown, at most")
    tokens: int = Field(
        0,
        ge=0,
        description="tokens of a whole trajectory, at most, prompt and answers included; 0: the model's context",
    )
    seconds: float = Field(60.0, gt=0, description="an answer that takes longer masks its trajectory")
    workers: int = Field(16, ge=1, description="environments that are asked at a time, each in a thread")

    @field_validator("tools", mode="before")
    @classmethod
    def _tools(cls, value: Any) -> Any:
        """On the command line several stand behind each other: `calculator,python:wall=5,slots=2`."""
        return split_specs(value) if isinstance(value, str) else value

    @property
    def answers(self) -> bool:
        """Whether there may be more than one turn."""
        return bool(self.tools) or self.use != "single_turn"


class CurriculumSection(Section):
    """The order of the training problems."""

    kind: Literal["uniform", "predicted", "staged"] = Field(
        "uniform",
        description="uniform: each once per epoch; predicted: prefer those whose outcome the critic finds open; "
        "staged: easy ones first",
    )
    floor: float = Field(0.1, gt=0, description="predicted: draw a problem in proportion to sqrt(V(1-V)) + floor")
    pool: int = Field(4, ge=2, description="predicted: candidates for each problem drawn; the critic reads them all")
    corrected: bool = Field(
        True, description="predicted: weight each advantage so that the objective stays the uniform one"
    )
    stages: tuple[float, ...] = Field(
        (), description="staged: the highest difficulty of each stage, rising, e.g. [3, 5, 8] (chain: its steps)"
    )
    clear: float = Field(
        0.6, gt=0, lt=1, description="staged: go on once the 95% interval of held-out accuracy is above this"
    )
    rehearse: float = Field(0.2, ge=0, lt=1, description="staged: the share of each step from earlier stages")
    aside: int = Field(
        0, ge=0, description="rest a problem solved, or failed, on each of its last N visits (biased); 0: never"
    )
    revisit: int = Field(2, ge=1, description="aside: how many epochs a problem rests")


class RewardSection(Section):
    """What judges a response."""

    use: str = Field(
        "answer",
        description="a module of rewards/ ('answer:extract=boxed', 'math', 'code'), your own package.module:object, or "
        "several: 'code + 0.2 * mine:style', 'math and mine:checked', 'math gate mine:format'",
    )
    anneal: int = Field(0, ge=0, description="steps over which the later parts of a sum fade to nothing; 0: they stay")
    limit: float = Field(
        600.0, gt=0, description="seconds per call of your own reward; then each sample alone, masked if it hangs"
    )
    workers: int = Field(
        0, ge=0, description="processes that judge, beside [cluster]'s others; 0: responses are judged in this process"
    )


class BootstrapSection(Section):
    """A supervised start on worked solutions; without this section the model starts as it is."""

    task: str | None = Field(None, description="problems with worked solutions; default: the training problems")
    steps: int = Field(300, ge=1, description="up to N optimiser updates")
    until: float | None = Field(None, gt=0, lt=1, description="stop once this share of training problems is solved")
    batch: int = Field(64, ge=1, description="solutions per update")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate; default: 2e-3 below 10M parameters, 1e-4 below 1B, 1e-5 above"
    )
    warmup: int = Field(50, ge=0, description="updates of linear warm-up")
    schedule: Schedule = Field("constant", description="after the warm-up")


class RolloutSection(Section):
    """How responses are sampled."""

    engine: str = Field(
        "local",
        description="'local' (the learner's own weights), 'vllm:key=value,…', 'served:url=…' (sppo rollout serve), or "
        "package.module:object",
    )
    prompts: int = Field(128, ge=1, description="prompts per step")
    samples: int = Field(1, ge=1, description="responses per prompt; SPPO needs one, group baselines two or more")
    segments: Literal["lines", "semicolons", "sentences", "paragraphs", "tokens"] = Field(
        "lines", description="what ends a segment of a response, for [search]; tokens: every token"
    )
    resample: int = Field(
        0, ge=0, description="up to N rounds that replace prompts whose samples all score the same (DAPO)"
    )
    max_tokens: int = Field(256, ge=1, description="response limit, EOS included")
    overlong: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the last share of max_tokens, over which the score falls linearly, by up to half of a right "
        "answer's (DAPO's over-long punishment); correctness and the critic's targets stay; 0: off",
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits in rollouts and in every log-probability")
    top_k: int = Field(0, ge=0, description="sample from the N likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the fewest tokens of this total probability; 1: all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="sample from tokens at least this fraction as likely as the likeliest; 0: all"
    )
    stop: tuple[str, ...] = Field((), description="a response ends at any of these strings; EOS always ends it")
    batch: int = Field(128, ge=1, description="sequences decoded together; changes speed and memory, not the samples")
    truncated: Literal["penalise", "mask", "keep"] = Field(
        "penalise",
        description="a response cut at max_tokens: penalise: scores 0; mask: leaves the loss and every denominator; "
        "keep: keeps the reward's verdict",
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every response at once")
        return value


MICRO_TOKENS = 16384
"""Tokens per micro-batch where memory allows it."""


class TrainingSection(Section):
    """The update."""

    steps: int = Field(200, ge=1, description="rollout-and-update steps")
    minibatches: int = Field(2, ge=1, description="optimiser updates per epoch over one step's rollouts")
    epochs: int = Field(1, ge=1, description="passes over one step's rollouts")
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate; default: 2e-4 below 10M parameters, 1e-5 below 1B, the paper's 1e-6 above; ten "
        "times that with [adapter]",
    )
    critic_lr: float | None = Field(
        None,
        gt=0,
        description="of the critic; default: 1e-3 below 10M parameters, 5e-5 below 1B, the paper's 5e-6 above; ten "
        "times that with critic.model = 'policy', up to 1e-3",
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Schedule = Field("constant", description="after the warm-up, to zero at the last step")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's")
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per micro-batch: decides memory and how sums are rounded; default: by model size and free "
        f"memory, up to {MICRO_TOKENS}",
    )
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw",
        description="of the policy; 8-bit moments (bitsandbytes) save 6 bytes per weight, and round differently",
    )
    checkpoint_activations: bool = Field(
        False, description="recompute each layer in the backward pass: less memory for one more forward pass"
    )
    offload: bool = Field(
        False,
        description="keep master weights, gradients and the optimiser's moments in main memory, not on the GPU; slower",
    )
    measure_noise: bool = Field(
        False, description="measure the policy gradient's variance on a step's first two minibatches (copies it)"
    )
    max_bad_updates: int = Field(3, ge=1, description="stop after N non-finite updates in a row (each is skipped)")

    @property
    def micro_budget(self) -> int:
        """`micro_tokens`, where it is given or was chosen (run/planning.py)."""
        return self.micro_tokens or MICRO_TOKENS


class SearchSection(Section):
    """Tree search for problems that sampling does not solve, learnt by supervision; off without this section."""

    below: float = Field(0.1, gt=0, le=1, description="search failed problems whose predicted chance is below this")
    problems: int = Field(8, ge=1, description="up to N problems per step, the most promising first")
    budget: int = Field(2000, ge=1, description="up to N tokens written per problem")
    value: Literal["outcomes", "steps", "critic"] = Field(
        "outcomes",
        description="guides the search: outcomes only; also a steps reward's scores (+ 0 * steps:…); or the critic at "
        "the segments' ends (baseline = 'token-critic')",
    )
    explore: float = Field(1.0, ge=0, description="PUCT's constant: the larger, the more it explores")
    width: float = Field(0.5, gt=0, description="a prefix visited n times gets up to width * sqrt(n) continuations")
    batch: int = Field(32, ge=1, description="up to N solutions learnt per step, beside the update")
    weight: float = Field(1.0, gt=0, description="weight of their loss, the mean negative log-probability per token")
    enough: float = Field(0.5, gt=0, le=1, description="the predicted chance at which a problem's weight reaches 0")


class MonitorsSection(Section):
    """Reward hacking and collapse: findings go to alerts.jsonl, the terminal and the page."""

    action: Literal["warn", "quarantine", "stop", "off"] = Field(
        "warn", description="quarantine: mask the responses of an alert; stop: save and end the run; off: no monitors"
    )
    sample: int = Field(
        16, ge=0, description="rewarded responses per step to judge again with other problems' references; 0: none"
    )
    second: str = Field("", description="a second verifier, as reward.use, for rewarded responses; it pays nothing")
    work_every: int = Field(
        20, ge=0, description="steps between checks whether right answers survive without their reasoning; 0: never"
    )


class EvaluationSection(Section):
    """Held-out accuracy along the way."""

    every: int = Field(20, ge=0, description="steps between evaluations; 0: only before and after")
    n: int = Field(256, ge=1, description="held-out problems")
    samples: int = Field(1, ge=1, description="responses per problem; from 2 on also the ceiling of explained variance")
    temperature: float | None = Field(None, ge=0, description="default: rollout.temperature; 0 is greedy")


class ClusterSection(Section):
    """Learner ranks and rollout workers beside this process (Ray); without this section everything runs in one."""

    learners: int = Field(1, ge=1, description="ranks that train the models together")
    rollouts: int = Field(1, ge=1, description="workers that sample, each with an engine and weights of its own")
    lag: int = Field(
        0, ge=0, le=8, description="sample N steps ahead, from weights N updates old; 1 overlaps sampling with learning"
    )
    chunk: int = Field(
        0,
        ge=0,
        description="responses that a worker samples at once, the unit of work; 0: a step's, divided by rollouts",
    )
    shards: int = Field(
        0,
        ge=0,
        description="ranks that hold one copy of the weights between them (FSDP2), a divisor of learners; 0: all of "
        "them from 1B parameters on, else 1, a copy on each",
    )
    gather: Literal["update", "layer"] = Field(
        "update",
        description="sharded weights are put together for a whole update, or layer by layer: less memory, more traffic",
    )
    address: str = Field("", description="of a running Ray cluster, or 'auto'; '': one is started here, and stopped")
    learner_gpus: float | None = Field(None, ge=0, description="GPUs per learner rank; default: 1 where there are any")
    rollout_gpus: float | None = Field(
        None, ge=0, description="GPUs per rollout worker; default: 1 where there are any"
    )
    learner_cpus: float = Field(1, ge=0, description="CPU cores that Ray reserves per learner rank")
    rollout_cpus: float = Field(1, ge=0, description="CPU cores that Ray reserves per rollout worker")
    timeout: float = Field(
        300,
        gt=0,
        description="seconds without a sign of life, or in one exchange between ranks, after which a worker is lost",
    )
    start_timeout: float = Field(1800, gt=0, description="seconds for a worker to start and to load its models")
    restarts: int = Field(10, ge=0, description="lost workers that are replaced, until the run ends")
    backoff: float = Field(1.0, ge=0, description="seconds before a replacement; doubled with each one, up to a minute")
    grace: float = Field(
        60,
        ge=0,
        description="seconds that a SIGTERM leaves a step to end, and be saved; then the last checkpoint counts",
    )


class RunSection(Section):
    """The run directory."""

    out: str = Field("runs/sppo", description="where the run is written")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    trackers: tuple[str, ...] = Field(
        (), description="metrics also go to: ['tensorboard', 'wandb:project=mine,mode=offline', 'mlflow', 'trackio']"
    )
    anchor: str = Field("", description="a file elsewhere for the audit chain's heads, to notice a rewritten run")
    threads: int = Field(
        0, ge=0, description="CPU threads; 0: OMP_NUM_THREADS, else the cores available (decides rounding)"
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GiB for the run (of the GPU if there is one); decides training.micro_tokens; default: free",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
