"""What a run does every so many steps beside training: it looks at its state and says what it saw."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from opensora_jax.training.logged import Video, Videos
from opensora_jax.training.state import TrainState


class Seen(NamedTuple):
    """Numbers and videos for the metrics; they are of the first process, all others may leave them out."""

    scalars: dict[str, float]
    videos: Videos


class Periodic(NamedTuple):
    """A look at the state every so many steps (0: never) and at the last one."""

    every: int
    look: Callable[[TrainState], Seen]

    def is_due(self, step: int, last: int) -> bool:
        """Returns whether to look after this step, counted from 1."""
        return bool(self.every) and (step % self.every == 0 or step == last)


def look_at(state: TrainState, periodic: Sequence[Periodic]) -> Seen:
    """Returns all that is seen of a state."""
    scalars: dict[str, float] = {}
    videos: dict[str, Video] = {}
    for seen in (one.look(state) for one in periodic):
        scalars |= seen.scalars
        videos |= seen.videos
    return Seen(scalars, videos)
