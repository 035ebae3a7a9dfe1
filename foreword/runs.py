"""The run folder: what a training run leaves behind, and what it resumes from.

config.json            what was asked for; a resumed run must ask for the same
start.safetensors      the prefix before training
metrics.jsonl          one line a step: loss, learning rate, tokens per second; held-out loss where evaluated
loss.png               both losses as a picture
checkpoints/step-*/    the newest training state, written aside and renamed: whole or not there
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["RunFolder", "check_started", "has_started", "make_room", "newest_checkpoint", "start_file", "steps_logged"]

_CONFIG, _METRICS, _START = "config.json", "metrics.jsonl", "start.safetensors"


class RunFolder:
    """A folder for one training run.

    Args:
        path: the folder; made if needed.
        config: everything that determines the result, as JSON values.
        resume: go on from the newest checkpoint.
        overwrite: delete what an earlier run left.

    Raises:
        ConfigError: there is an earlier run and neither `resume` nor `overwrite`, nothing to resume, or the earlier run
            was asked for something else.
    """

    def __init__(
        self, path: str | Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self._config_file = self.path / _CONFIG
        self._metrics_file = self.path / _METRICS
        self._checkpoints = self.path / "checkpoints"
        self.start_file = self.path / _START
        config = json.loads(json.dumps(config))  # as it will read back
        if resume:
            self._check_same(config)
            return
        make_room(self.path, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self._config_file, json.dumps(config, indent=2) + "\n")

    def _check_same(self, config: dict[str, Any]) -> None:
        check_started(self.path)
        earlier = json.loads(self._config_file.read_text("utf-8"))
        then, now = _flat(earlier), _flat(config)
        changed = [
            f"{key}: then {then.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started differently: {'; '.join(changed)}. "
                "Resume with the same options and data, or start over with --overwrite."
            )

    # checkpoints

    def save_checkpoint(self, step: int, write: Callable[[str], object]) -> None:
        """`write` fills a folder; it becomes the newest checkpoint, and older ones are deleted."""
        aside = self._checkpoints / "writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(str(aside))
        target = self._checkpoints / f"step-{step:06d}"
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        for old in self._checkpoints.glob("step-*"):
            if old != target:
                shutil.rmtree(old)

    # metrics

    def log(self, values: dict[str, int | float]) -> None:
        """Append one line to metrics.jsonl."""
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a run that was killed may have left half a line."""
        if not self._metrics_file.exists():
            return []
        lines = self._metrics_file.read_text("utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def rewind(self, step: int) -> None:
        """Forget the metrics of later steps, which will be run again."""
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= step]
        _write(self._metrics_file, "".join(kept))

    def draw(self) -> None:
        """Draw loss.png."""
        from matplotlib.figure import Figure

        metrics = self.metrics()
        held_out = [entry for entry in metrics if "held_out_loss" in entry]
        steps = [entry for entry in metrics if "loss" in entry]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss per completion token or label (nats)")
        axes.plot(
            [e["step"] for e in steps], [e["loss"] for e in steps], color="#9aa7b5", linewidth=1, label="training"
        )
        if held_out:
            best = min(held_out, key=lambda entry: entry["held_out_loss"])
            line = [e["step"] for e in held_out], [e["held_out_loss"] for e in held_out]
            axes.plot(*line, color="#c8472f", marker="o", markersize=4, label="held out")
            text = f"best {best['held_out_loss']:.3f}"
            where = (best["step"], best["held_out_loss"])
            axes.annotate(text, where, xytext=(0, 10), textcoords="offset points", ha="right", color="#c8472f")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(self.path / "loss.png", dpi=130)


def has_started(run: str | Path) -> bool:
    """Whether there is a run in this folder."""
    return (Path(run) / _CONFIG).exists()


def check_started(run: str | Path) -> None:
    """Raise `ConfigError` where there is no run to go on with."""
    if not has_started(run):
        raise ConfigError(f"{run}: no run to resume. Start it without --resume.")


def make_room(run: str | Path, *, overwrite: bool) -> None:
    """Delete an earlier run if `overwrite` says so; otherwise it is a `ConfigError`."""
    if not has_started(run):
        return
    if not overwrite:
        raise ConfigError(
            f"{run} holds an earlier run. Go on with it (--resume), or start over and delete it (--overwrite)."
        )
    shutil.rmtree(run)


def steps_logged(run: str | Path) -> int:
    """How many steps the run's metrics tell of so far."""
    metrics = Path(run) / _METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint in a run folder."""
    return max((Path(run) / "checkpoints").glob("step-*"), default=None)


def start_file(checkpoint: Path) -> Path:
    """The prefix that the run of a checkpoint started from."""
    return checkpoint.parent.parent / _START


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """`{"train": {"steps": 2}}` as `{"train.steps": 2}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)
