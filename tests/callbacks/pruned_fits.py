"""Common code for tests of pruned fits."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy

from sparsefit.callbacks import PrunedRunCallback


class Watch(PrunedRunCallback):
    """Records when the model is pruned, and its state at that time."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.zeros: list[int] = []

    def on_pruning_start(self, trainer, module):
        self.note("start", module)

    def on_pruning_end(self, trainer, module, result):
        self.note("end", module)
        self.result = result

    def on_train_start(self, trainer, module):
        self.note("train", module)

    def note(self, event, module):
        self.events.append(event)
        self.zeros.append(sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1))


class RestoresLate(SingleDeviceStrategy):
    """Restores weights and callbacks after setup, as FSDP does."""

    restore_checkpoint_after_setup = True


def strategy(late: bool):
    return {"strategy": RestoresLate(device="cpu"), "accelerator": "auto"} if late else {}
