"""What a profile's run tells its caller while it goes on: what it will take, and how far it is."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from lexi_search.models.loading.residence import Staying
from lexi_search.profiling.resume import Partials


class Plan(NamedTuple):
    """What a run will take, known before it begins.

    `work` has for every decoder layer of every pass over the model, in order, how many copies of the text go through;
    it is empty on the paper's input. `read_bytes` of weights are read in all, once for those that stay in memory;
    `memory_bytes` are for hidden states or expert outputs, and for `weights_bytes` of the two largest layers as stored.
    `phases` names what the passes are for, and says how many each takes, in order. `staying` says where weights are
    between passes; None on the paper's input, where there is one pass. `copies` of them are kept, each for a share of
    the text.
    """

    work: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    decoder_layers: int
    read_bytes: int
    memory_bytes: int
    weights_bytes: int
    staying: Staying | None
    copies: int = 1


@runtime_checkable
class Observer(Protocol):
    """A listener to the events of a run, a method for each; all of them are called from the caller's thread."""

    def plan(self, plan: Plan) -> None:
        """What the run will take; after `open`, in process 0 only."""

    def open(self, partials: Partials, layers: Sequence[int]) -> None:
        """Results of an earlier run are loaded; `layers` are those of the profile. In process 0 only."""

    def advance_pass(self, layer: int) -> None:
        """A decoder layer is done in one of the passes over the whole model; on input `weights` only."""

    def finish_layer(self, layer: int) -> None:
        """The losses of a MoE layer are measured; in process 0 they are on disk."""


class Silent(Observer):
    """The default observer, which does nothing."""
