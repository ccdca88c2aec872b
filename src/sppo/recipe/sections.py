"""The sections of a recipe, in the order in which data flows: every key with its default, its bounds and its help text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..spec import named_columns, nearest
from .presets import CHANCES, DEFAULT, LONG_RATIO, PRESETS, RENAMED, SHORT


class Section(BaseModel):
    """One table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicySection(Section):
    """The model that is trained."""

    model: str = Field(
        "tiny",
        description="a model folder, a hub name, or 'tiny:hidden=128,layers=3,heads=4' (made here, from scratch)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="weights during rollouts and updates; auto: bfloat16 for 50M parameters or more on hardware that "
        "multiplies it natively, else float32 (master weights, head and log-softmax are always float32)",
    )
    chat_template: Literal["auto", "off"] = Field(
        "auto", description="auto: chat messages go through the tokenizer's template if it has one; off: plain text"
    )


class CriticSection(Section):
    """The prompt-only value model V(x): any family, any size, its own tokenizer."""

    model: str = Field(
        "tiny:hidden=64,layers=2,heads=4", description="as policy.model; any transformers model, encoder or decoder"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="as policy.dtype")


class TaskSection(Section):
    """Which problems."""

    train: str = Field(
        "chain:steps=4-6",
        description="training problems: 'name:key=value,…', or a file of rows (.jsonl, .json, .csv, .tsv, .parquet), absolute or relative to "
        "the recipe",
    )
    eval: str | None = Field(
        None, description="held-out problems; default: the held-out share of the training problems"
    )
    columns: dict[str, str] | None = Field(
        None,
        description="which columns of the rows to use by which name, e.g. {prompt = 'q', answer = 'meta.gold'}, or prompt=q,answer=meta.gold",
    )
    instruction: str = Field("", description="text added after every question, e.g. how to mark the answer")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are left out and counted, never cut")

    @field_validator("columns", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        return named_columns(value) if isinstance(value, str) else value


class CurriculumSection(Section):
    """Which of the training problems come when."""

    kind: Literal["uniform", "predicted", "staged"] = Field(
        "uniform",
        description="uniform: each once an epoch; predicted: rather those whose outcome the critic thinks open; staged: easy ones first",
    )
    floor: float = Field(
        0.1,
        gt=0,
        description="predicted: a problem is drawn in proportion to sqrt(V(1-V)) + floor; the deviation itself is 0.5 at most",
    )
    pool: int = Field(4, ge=2, description="predicted: candidates for each problem drawn; the critic reads them all")
    corrected: bool = Field(
        True,
        description="predicted: divide each advantage by how much likelier its problem was made, so that the objective stays the uniform one",
    )
    stages: tuple[float, ...] = Field(
        (),
        description="staged: the highest difficulty of each stage, rising, e.g. [3, 5, 8]; problems say theirs (chain: steps)",
    )
    clear: float = Field(
        0.6,
        gt=0,
        lt=1,
        description="staged: go on when the 95% interval of the held-out accuracy on the present stage lies above this",
    )
    rehearse: float = Field(0.2, ge=0, lt=1, description="staged: the share of every step that is from earlier stages")
    aside: int = Field(
        0,
        ge=0,
        description="let a problem rest that was solved, or not solved, at each of its last so many visits (a bias); 0: never",
    )
    revisit: int = Field(2, ge=1, description="aside: for so many epochs")

    @model_validator(mode="after")
    def _stages_rise(self) -> CurriculumSection:
        if (self.kind == "staged") != bool(self.stages):
            raise ValueError(
                "kind = 'staged' needs stages, the highest difficulty of each, e.g. stages = [3, 5, 8]"
                if self.kind == "staged"
                else f"stages belong to kind = 'staged', and kind is {self.kind!r}"
            )
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages must rise, and {list(self.stages)} does not")
        return self


class RewardSection(Section):
    """What judges a response."""

    use: str = Field(
        "answer",
        description="a file of rewards/ with options ('answer:extract=boxed', 'math', 'code'), package.module:object, or several: "
        "'code + 0.2 * mine:style', 'math and mine:checked', 'math gate mine:format'",
    )
    anneal: int = Field(
        0, ge=0, description="what a mixture adds to its first part fades to nothing over so many steps; 0: it stays"
    )
    limit: float = Field(
        600.0,
        gt=0,
        description="seconds that one call of your own reward may take; then its samples are judged one by one, and masked where they hang",
    )


class BootstrapSection(Section):
    """A supervised start on worked solutions; a recipe without this section starts from the model as it is."""

    task: str | None = Field(None, description="problems with worked solutions; default: the training problems")
    steps: int = Field(300, ge=1, description="optimiser updates, at most")
    until: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="stop as soon as this share of training problems is solved: reinforcement needs some success, not all",
    )
    batch: int = Field(64, ge=1, description="solutions an update")
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate; default by size: 2e-3 below 10M parameters, 1e-4 below 1B, 1e-5 above",
    )
    warmup: int = Field(50, ge=0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")


class RolloutSection(Section):
    """How responses are sampled."""

    engine: str = Field(
        "local",
        description="what samples: 'local' (here, on the learner's weights), 'vllm:key=value,…', or package.module:object",
    )
    prompts: int = Field(128, ge=1, description="prompts a step")
    samples: int = Field(1, ge=1, description="responses a prompt; SPPO needs one, group baselines two or more")
    kind: Literal["samples", "tree"] = Field(
        "samples",
        description="tree: a response branches at a segment's end where the policy is unsure what comes next; its leaves share what lies before",
    )
    segments: Literal["lines", "semicolons", "sentences", "paragraphs", "tokens"] = Field(
        "lines",
        description="what ends a segment of a response, for kind = 'tree', objective.phi = 'segments' and [search]; tokens: every token",
    )
    branch: int = Field(2, ge=2, description="tree: how many ways a response goes on where it branches")
    entropy: float = Field(
        0.5,
        ge=0,
        description="tree: branch where the next token's whole distribution has so many nats of entropy or more",
    )
    budget: int | None = Field(
        None, ge=1, description="tree: tokens of one prompt's tree, never exceeded; default: four times max_tokens"
    )
    leaves: int = Field(
        16, ge=2, description="tree: responses of one prompt's tree at most; each is a row of the update"
    )
    resample: int = Field(
        0,
        ge=0,
        description="replace prompts whose samples all score the same, in at most so many more rounds (DAPO's dynamic sampling); 0: keep them",
    )
    max_tokens: int = Field(256, ge=1, description="response limit, EOS included")
    overlong: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the last share of max_tokens in which a response loses score, in a line up to half of what a right answer earns (DAPO's soft "
        "over-long punishment); what counts as right, and is learnt by the critic, stays; 0: no penalty",
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits in rollouts and in every log-probability")
    top_k: int = Field(0, ge=0, description="draw among so many of the likeliest tokens; 0: all of them")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw among the fewest tokens that hold this much of the probability; 1: all of them",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="draw among tokens at least so many times as likely as the likeliest; 0: all of them",
    )
    stop: tuple[str, ...] = Field(
        (), description="a response ends once it holds one of these strings; EOS always ends it"
    )
    batch: int = Field(128, ge=1, description="sequences decoded together; changes speed and memory, not the samples")
    truncated: Literal["penalise", "mask", "keep"] = Field(
        "penalise",
        description="a response cut at max_tokens scores 0 whatever the reward says (penalise), is masked and leaves every denominator (mask), or "
        "keeps the verdict of the reward (keep)",
    )

    @property
    def tree_budget(self) -> int:
        """`budget`, or its default."""
        return 4 * self.max_tokens if self.budget is None else self.budget

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every response at once")
        return value


PER_TOKEN = ("token", "geometric-token")
"""Values of `objective.ratio` that give every token a ratio, and can take an advantage for each."""


class ObjectiveSection(Section):
    """The clipped sequence-level surrogate, or a peer's."""

    algorithm: str = Field(
        DEFAULT,
        description="a preset for the keys below and rollout.samples, where they are not given: " + ", ".join(PRESETS),
    )
    baseline: Literal["critic", "centred", "beta", "hybrid", "token-critic", "batch", "others", "group", "greedy"] = Field(
        "critic",
        description="what the reward is compared with: V(x); centred: V(x) and what it missed on the step's other problems of that difficulty; "
        "beta: V(x) with the prompt's past and other samples; hybrid: V(x) and what the steps written so far tell (objective.phi); token-critic: "
        "a value for every token and GAE; batch, others, group: the mean of the batch's other rewards, of the prompt's other samples, of all its "
        "samples; greedy: the greedy response's reward",
    )  # fmt: skip
    baseline_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="of baseline = 'critic': V(x) times this; 0.5 and 0 are the controls that any other baseline must beat",
    )
    optimal_baseline: bool = Field(
        False,
        description="with baseline = 'critic', 'centred' or 'beta': shift its odds to the baseline of least gradient variance, measured in earlier "
        "steps (preset sppo-optimal)",
    )
    scale: Literal["none", "group", "batch"] = Field(
        "none",
        description="divide the advantage by the deviation of its group's rewards, or whiten it over the batch (both biased)",
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of baseline = 'token-critic'")
    value_loss: Literal["cross-entropy", "squared"] = Field(
        "cross-entropy",
        description="of baseline = 'token-critic': cross-entropy of a chance, or PPO's squared error of a value that may be any number",
    )
    value_clip: float = Field(
        0.0,
        ge=0,
        description="of value_loss = 'squared': a value that has moved by more than this in a step moves no further (PPO2's code); 0: no clip",
    )
    phi: Literal["segments", "steps", "siblings"] = Field(
        "segments",
        description="of baseline = 'hybrid': the critic at the segments' ends; the step scores that the reward measures (+ 0 * steps:…); how a "
        "fork's other children ended (rollout.kind = 'tree')",
    )
    half_life: float = Field(
        1.0, gt=0, description="of baseline = 'beta': nats by which the policy moves until a past reward counts half"
    )
    surrogate: Literal["clip", "cispo", "gmpo", "sapo", "plain"] = Field(
        "clip",
        description="clip: PPO's; cispo: a clipped weight on the log-probability; gmpo: the geometric mean of a response's clipped token ratios; sapo: a "
        "sigmoid gate instead of the clip; plain: the log-probability alone (REINFORCE)",
    )
    gate_temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 1.05),
        description="of surrogate = 'sapo': [where the advantage is positive, elsewhere]; the higher, the faster a token far off policy loses its gradient",
    )
    average: Literal["auto", "tokens", "responses", "constant"] = Field(
        "auto",
        description="what a loss of token ratios averages over: all tokens (auto), each response's tokens and then responses, or "
        "responses times rollout.max_tokens; sequence ratios: responses (auto)",
    )
    ratio: Literal["auto", "sequence", "geometric", "token", "geometric-token", "family"] = Field(
        "auto",
        description="importance ratio: exp(l), exp(l/T) (GSPO), per token, exp(l/T) with each token's own gradient (GSPO-token), or exp(l/T^kappa); auto: "
        f"sequence where a step has one update or rollout.max_tokens is {SHORT} or less, else {LONG_RATIO['ratio']}; said at start, kept in the run's recipe",
    )
    kappa: float = Field(0.5, ge=0, le=1, description="the family's exponent; 0 is sequence, 1 is geometric")
    clip: tuple[float, float] = Field((0.2, 0.2), description="[low, high]: the ratio is clipped to [1-low, 1+high]")
    dual_clip: float = Field(
        3.0, ge=0, description="bound on the ratio where the advantage is negative; 0 turns it off"
    )
    anchor: Literal["behaviour", "reference"] = Field(
        "behaviour",
        description="the ratio's denominator: the sampling policy (exact), or the frozen start (see docs/algorithm.md)",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL to the frozen start; 0 holds no reference model")
    kl_form: Literal["reward", "k2", "k3", "k3-weighted"] = Field(
        "reward",
        description="reward: x = log policy/ref inside the reward; in the loss k2: x^2/2, k3: exp(-x)-1+x (GRPO's), k3-weighted: k3 times the ratio to "
        "the sampling policy (TRL's). Of whole responses, on policy: the gradient of KL(policy||ref), k3 that of KL(ref||policy); see docs/algorithm.md",
    )
    kl_level: Literal["auto", "sequence", "token"] = Field(
        "auto",
        description="of a KL in the loss: of whole responses, averaged over them, or of each token, averaged as the loss is (GRPO's); "
        "auto: as the ratio",
    )
    entropy_bonus: float = Field(
        0.0,
        ge=0,
        description="weight of the entropy of each token's distribution, averaged as the loss is (PPO's bonus against collapse)",
    )
    ev_gate: bool = Field(
        False,
        description="use the mean of the other rewards instead of V(x) while V explains no variance (arXiv 2604.19485)",
    )
    engine_correction: float = Field(
        2.0, ge=0, description="cap of the importance weight that corrects engine-learner mismatch; 0 turns it off"
    )
    engine_correction_level: Literal["auto", "token", "sequence"] = Field(
        "auto",
        description="token: a weight for each token's gradient; sequence: one for the response, of the kind of the ratio (exp(l) with token ratios); "
        f"auto: sequence where the ratio is of whole responses and rollout.max_tokens is {SHORT} or less, else token",
    )
    engine_correction_beyond: Literal["truncate", "mask"] = Field(
        "truncate",
        description="a weight above the cap: is cut to it (truncate), or the response or token leaves the loss, and stays in its average (mask)",
    )
    engine_gap_limit: float | None = Field(
        None,
        gt=0,
        description="stop when engine and learner log-probabilities differ by more than this a token, on average; default: several times what "
        "they differ by in the first step, which must be what rounding in policy.dtype can cause",
    )

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be above 1, or 0 to turn it off")
        return value

    @field_validator("clip")
    @classmethod
    def _clip_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (0 < low <= 1 and high > 0):
            raise ValueError("low must lie in (0, 1] and high above 0")
        return value

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: str) -> str:
        if value in RENAMED:
            raise ValueError(f"{value!r} has a new name: {RENAMED[value]!r}")
        if value not in PRESETS:
            raise ValueError(nearest(value, list(PRESETS)))
        return value

    @property
    def kl_of_tokens(self) -> bool:
        """Whether a KL in the loss is of each token."""
        return self.kl_level == "token" or (self.kl_level == "auto" and self.ratio in PER_TOKEN)

    @model_validator(mode="after")
    def _fits_together(self) -> ObjectiveSection:
        if self.baseline == "token-critic" and self.ratio not in PER_TOKEN:
            raise ValueError("baseline = 'token-critic' gives every token an advantage of its own: set ratio = 'token'")
        if self.value_loss == "squared" and self.baseline != "token-critic":
            raise ValueError(
                f"value_loss = 'squared' is of baseline = 'token-critic', and V(x) of {self.baseline!r} is a chance: set value_loss = 'cross-entropy'"
            )
        if self.value_clip and self.value_loss != "squared":
            raise ValueError("value_clip is of value_loss = 'squared': set that, or value_clip = 0")
        if self.baseline == "hybrid" and self.ratio not in PER_TOKEN:
            raise ValueError("baseline = 'hybrid' gives every token an advantage of its own: set ratio = 'token'")
        if self.surrogate == "gmpo" and (self.ratio != "token" or self.average != "responses"):
            raise ValueError(
                "surrogate = 'gmpo' takes one mean over each response's token ratios: set ratio = 'token' and average = 'responses'"
            )
        if self.average != "auto" and self.ratio not in PER_TOKEN:
            raise ValueError(
                f"average = {self.average!r} is about tokens, and ratio is {self.ratio!r}: set ratio = 'token' (or leave it to the preset of "
                f"algorithm = {self.algorithm!r}), or average = 'auto'"
            )
        if self.optimal_baseline and self.baseline not in CHANCES:
            raise ValueError(
                f"optimal_baseline shifts the odds of a chance of success, and baseline = {self.baseline!r} is none: use 'critic', 'centred' or 'beta', or "
                "set optimal_baseline = false"
            )
        if self.optimal_baseline and self.scale == "batch":
            raise ValueError(
                "scale = 'batch' takes back the shift of optimal_baseline: leave it out, or set optimal_baseline = false"
            )
        if self.baseline_weight != 1 and (self.baseline != "critic" or self.ev_gate or self.optimal_baseline):
            raise ValueError(
                "baseline_weight is about baseline = 'critic' as it is, without optimal_baseline or ev_gate"
            )
        if self.ev_gate and self.baseline != "critic":
            raise ValueError("ev_gate is about baseline = 'critic'")
        return self


MICRO_TOKENS = 16384
"""Tokens per micro-batch where memory is no matter."""


class TrainingSection(Section):
    """The update."""

    steps: int = Field(200, ge=1, description="rollout-and-update steps")
    minibatches: int = Field(2, ge=1, description="optimiser updates an epoch over one step's rollouts")
    epochs: int = Field(1, ge=1, description="passes over one step's rollouts")
    lr: float | None = Field(
        None,
        gt=0,
        description="policy learning rate; default by size: 2e-4 below 10M parameters, 1e-5 below 1B, the paper's 1e-6 above",
    )
    critic_lr: float | None = Field(
        None,
        gt=0,
        description="critic learning rate; default by size: 1e-3 below 10M parameters, 5e-5 below 1B, the paper's 5e-6 above",
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up, to zero at the last step"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's"
    )
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per micro-batch: memory, and how sums are rounded; default: by the model's size and the memory that is free, at most "
        f"{MICRO_TOKENS}, said at start and kept in the run's recipe",
    )
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw",
        description="of the policy: AdamW, or with 8-bit moments (bitsandbytes): 6 bytes a weight less, not the same bits",
    )
    checkpoint_activations: bool = Field(
        False,
        description="compute each layer again in the backward pass instead of keeping it: less memory for one more forward pass",
    )
    measure_noise: bool = Field(
        False,
        description="measure the variance of the policy's gradient from a step's first two minibatches (holds a copy of the gradient)",
    )
    max_bad_updates: int = Field(
        3, ge=1, description="stop after this many non-finite updates in a row (each is skipped and counted)"
    )

    @property
    def micro_budget(self) -> int:
        """`micro_tokens`, where it is given or was chosen (run/plan.py)."""
        return self.micro_tokens or MICRO_TOKENS


class SearchSection(Section):
    """Tree search for the problems that sampling does not solve; what it finds is learnt by supervision. Without this section there is none."""

    below: float = Field(
        0.1,
        gt=0,
        le=1,
        description="search problems that failed and to which the critic gives a lower chance than this",
    )
    problems: int = Field(8, ge=1, description="of a step, at most; the most hopeful ones first")
    budget: int = Field(2000, ge=1, description="tokens written for one problem, at most")
    value: Literal["outcomes", "steps", "critic"] = Field(
        "outcomes",
        description="what guides it beside outcomes: nothing; the step scores that the reward measures (+ 0 * steps:…); the critic at the "
        "segments' ends (of objective.phi = 'segments' or 'token-critic')",
    )
    explore: float = Field(
        1.0, ge=0, description="PUCT's constant: the larger, the more it tries what it has tried less"
    )
    width: float = Field(
        0.5, gt=0, description="of a prefix visited n times, the policy writes on from it up to width * sqrt(n) times"
    )
    batch: int = Field(32, ge=1, description="solutions learnt beside each step's update, at most")
    weight: float = Field(1.0, gt=0, description="of their loss (the mean negative log-probability of a token)")
    enough: float = Field(
        0.5, gt=0, le=1, description="the weight falls to nothing as the critic's chance for the problem rises to this"
    )

    @model_validator(mode="after")
    def _worth_it(self) -> SearchSection:
        if self.below > self.enough:
            raise ValueError(
                f"below = {self.below:g} is above enough = {self.enough:g}: what is found for problems in between would weigh nothing"
            )
        return self


class MonitorsSection(Section):
    """Reward hacking and collapse (audit/monitors.py): what is found goes to alerts.jsonl, the terminal and the page."""

    action: Literal["warn", "quarantine", "stop", "off"] = Field(
        "warn",
        description="quarantine: mask the responses that an alert is about (never a silent 0); stop: save and end the run; off: no monitors",
    )
    sample: int = Field(
        16,
        ge=0,
        description="rewarded responses of a step that are judged again, against other problems' references; 0: none",
    )
    second: str = Field(
        "", description="a second verifier, as reward.use, that rewarded responses are shown to; it pays nothing"
    )
    work_every: int = Field(
        20,
        ge=0,
        description="steps between looks at answers without work (right responses, their chain cut away, the answer forced); 0: never",
    )


class EvaluationSection(Section):
    """Held-out accuracy along the way."""

    every: int = Field(20, ge=0, description="steps between evaluations; 0: only before and after")
    n: int = Field(256, ge=1, description="held-out problems")
    samples: int = Field(
        1, ge=1, description="responses a problem (two or more also give the ceiling of explained variance)"
    )
    temperature: float | None = Field(None, ge=0, description="default: rollout.temperature; 0 is greedy")


class RunSection(Section):
    """The run directory."""

    out: str = Field("runs/sppo", description="where the run is written")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest first")
    trackers: tuple[str, ...] = Field(
        (),
        description="where each step's numbers also go: ['tensorboard', 'wandb:project=mine,mode=offline', 'mlflow', 'trackio']",
    )
    anchor: str = Field(
        "",
        description="a file outside the run that is told the audit chain's head at each line, so that a run written anew is noticed; '': none",
    )
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads; 0: OMP_NUM_THREADS, else the cores that affinity and a container's limit give. Bit-identical results need the "
        "same number",
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GiB that the run may take, of the GPU's where there is one: training.micro_tokens is chosen by it, and what does not fit is "
        "said at start; default: what is free",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
