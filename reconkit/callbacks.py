"""What may listen to a pruning, in the manner of the Hugging Face Trainer's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pruning import Pruning


class Callback:
    """Each method is called with the `Pruning`, whose `state` holds the tables and hidden states so far."""

    def on_begin(self, pruning: Pruning) -> None:
        """The model was checked; its hidden states stand before the first block. A callback may restore an earlier state here."""

    def on_window_begin(self, pruning: Pruning, window: range) -> None:
        """The hidden states stand before `window`, which is neither pruned nor trained."""

    def on_mask_end(self, pruning: Pruning, window: range) -> None:
        """The new blocks of `window` are pruned, and not yet trained."""

    def on_epoch_end(self, pruning: Pruning, window: range, epoch: int) -> None:
        """An epoch of `window` is over; 0 is the measurement before training. Its losses are in `pruning.state.training`."""

    def on_window_end(self, pruning: Pruning, window: range) -> None:
        """`window` is trained."""

    def on_block_end(self, pruning: Pruning, block: int) -> None:
        """`block` is finished: the hidden states went through it, and its error was measured."""

    def on_warning(self, pruning: Pruning, text: str) -> None:
        """A callback warns; `text` is among the notes."""

    def on_end(self, pruning: Pruning, error: BaseException | None) -> None:
        """The pruning is over, or ended by `error`."""
