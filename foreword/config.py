"""What can be asked for: the options of a prefix and of its training. Plain data, quick to import."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError

__all__ = ["SHARED", "Precision", "PrefixConfig", "TaskName", "TrainConfig"]

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "fp8"]
SHARED = ("task", "micro_batches", "tracker", "compile", "gradient_checkpointing")  # by runs that are trained together
TaskName = Literal["completion", "classification", "token_classification", "question_answering"]
_Initialization = Literal["demonstrations", "text", "random", "noop"]
_Reparameterization = Literal["none", "mlp"]


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")


@dataclass(frozen=True)
class PrefixConfig:
    """What a new prefix looks like before training.

    Args:
        num_virtual_tokens: P, the number of key and value vectors that each attention site sees.
        num_encoder_virtual_tokens: P in the encoder of an encoder-decoder; by default the same. 0: no prefix there.
        num_cross_virtual_tokens: P where a decoder attends to an encoder; by default the same. 0: no prefix there.
        num_layers: how many attention layers see the prefix, counted from the input; by default all.
        initialization: where the first keys and values come from. `demonstrations`: training rows, compacted into
            `num_virtual_tokens`; `text`: `init_text`; `random`: keys and values drawn with the statistics of the
            model's own; `noop`: random ones behind closed gates, so that step 0 equals the base exactly. By default
            `demonstrations` for the completions of a decoder, `random` for encoder-decoders and tasks with a head.
        num_demonstrations: how many training rows the `demonstrations` start renders into context.
        init_text: the text for `text`, for example an instruction.
        freeze_first: keep the first virtual token as it starts, as an attention sink. `None`: exactly when the start
            comes from text (`demonstrations`, `text`).
        reparameterization: `none` trains keys and values themselves; `mlp` trains an embedding and a two-layer tanh
            network that yields them (Li & Liang 2021, section 4.3), folded away after training.
        mlp_width: the width of the hidden layer and of the embedding, for `mlp`.
    """

    num_virtual_tokens: int = 16
    num_encoder_virtual_tokens: int | None = None
    num_cross_virtual_tokens: int | None = None
    num_layers: int | None = None
    initialization: _Initialization | None = None
    num_demonstrations: int = 3
    init_text: str | None = None
    freeze_first: bool | None = None
    reparameterization: _Reparameterization = "none"
    mlp_width: int = 512

    def __post_init__(self) -> None:
        _check_choice("reparameterization", self.reparameterization, _Reparameterization)
        if self.initialization is not None:
            _check_choice("initialization", self.initialization, _Initialization)
        for name in ("num_virtual_tokens", "num_demonstrations", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_layers is not None and self.num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, got {self.num_layers}.")
        for name in ("num_encoder_virtual_tokens", "num_cross_virtual_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if (self.initialization == "text") != (self.init_text is not None):
            raise ConfigError(
                "init_text belongs to initialization='text' and to no other: "
                f"got initialization={self.initialization!r}, init_text={self.init_text!r}."
            )
        chosen = (self.initialization, self.freeze_first) != (None, None)  # else training chooses, and checks again
        if chosen and self.freezes_first and self.num_virtual_tokens == 1:
            raise ConfigError(
                "With one virtual token and the first one frozen nothing is left to train: "
                "use num_virtual_tokens of 2 or more, or freeze_first=False."
            )

    @property
    def freezes_first(self) -> bool:
        """Whether the first virtual token stays as it starts."""
        if self.freeze_first is None:
            return self.initialization in ("demonstrations", "text", None)
        return self.freeze_first


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        task: what the prefix is for. `completion`: rows of prompt and completion. `classification`: rows of `text` and
            `label`; `token_classification`: rows of `tokens` and `labels`; `question_answering`: rows of `question`,
            `context` and `answer`. For these three a head is trained with the prefix.
        steps: optimizer steps.
        batch_size: rows a step.
        micro_batches: into how many parts each batch is split, to save memory; the result is the same.
        learning_rate: of AdamW, at the first step; it falls linearly to zero.
        head_learning_rate: the same for the head, where the task has one.
        dropout: train through the base's own dropout, against overfitting. By default exactly for tasks with a head.
        max_length: tokens that a row may have.
        held_out_fraction: the share of the rows set aside to measure progress, at most 64 rows; unused where held-out
            rows are given.
        evaluate_every: steps between two evaluations on the held-out rows.
        averaging: what is evaluated and kept is a moving average over the steps, which keeps this share of itself in each
            (Polyak & Juditsky 1992; docs/decisions/16). 0: the last step as it is.
        patience: evaluations without improvement after which training stops. The best prefix is kept.
        checkpoint_every: steps between two checkpoints.
        seed: fixes the order of the rows and every random number.
        skip_bad_rows: leave bad rows out and count them, instead of an error.
        compile: compile the model's layers, which takes a minute and then makes a step faster. By default on GPUs for 1,000
            steps or more.
        gradient_checkpointing: keep no more than each layer's input for the backward pass, and compute the layers a second
            time there: less memory, a third more arithmetic, the same prefix.
        tracker: a tracker of Accelerate's, such as `tensorboard` or `wandb`, to log to as well.
    """

    task: TaskName = "completion"
    steps: int = 300
    batch_size: int = 4
    micro_batches: int = 1
    learning_rate: float = 3e-2
    head_learning_rate: float = 1e-2
    dropout: bool | None = None
    max_length: int = 1024
    held_out_fraction: float = 0.1
    evaluate_every: int = 25
    averaging: float = 0.95
    patience: int = 4
    checkpoint_every: int = 25
    seed: int = 0
    skip_bad_rows: bool = False
    compile: bool | None = None
    gradient_checkpointing: bool = False
    tracker: str | None = None

    def __post_init__(self) -> None:
        _check_choice("task", self.task, TaskName)
        counts = (
            "steps",
            "batch_size",
            "micro_batches",
            "max_length",
            "evaluate_every",
            "patience",
            "checkpoint_every",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "head_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("held_out_fraction", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
