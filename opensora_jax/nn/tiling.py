"""Encoding and decoding in tiles that overlap and are blended: memory for one tile, whatever the length and size.

This approximates the whole: a tile's norms and attention see the tile alone. The tiles are a Python loop, so outside
`jax.jit` each of them runs by itself, and a compiled function of a tile compiles once per shape of tile, of which an
axis has one for whole tiles and one or two at its end; inside `jax.jit` the loop is unrolled. On a mesh, equal tiles in
space run beside each other, one on each device.
Source: hpcaitech/Open-Sora, `opensora/models/hunyuan_vae/autoencoder_kl_causal_3d.py` and
`opensora/models/dc_ae/models/dc_ae.py`, which follow tiling in diffusers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import get_abstract_mesh
from jaxtyping import Float

from opensora_jax.parallel.samples import group_of, groups_at_once, one_each

OfTile = Callable[..., Array]  # of a tile; with `each_alone=True`, of tiles of which every device has one
Tile = dict[int, tuple[int, int]]  # axis -> (start, size)
TIME, ROWS, COLUMNS = 1, 2, 3  # axes of B T H W C


@dataclass(frozen=True)
class Tiling:
    """How to cut: tile sizes in pixels and frames, and the share of a tile that the next one covers again.

    `strides` are the pixels for one latent position. Where `is_causal`, the first frame has a latent of its own, so a
    temporal tile takes one frame more, whose latent only the first tile keeps.
    """

    strides: tuple[int, int, int]
    is_causal: bool
    use_spatial_tiling: bool
    use_temporal_tiling: bool
    spatial_tile_size: int
    temporal_tile_size: int
    tile_overlap_factor: float

    def __post_init__(self):
        """Check that tiles and overlaps are whole latents: else the parts would not add up to the whole."""
        if not 0 <= self.tile_overlap_factor <= 0.99:
            raise ValueError(f"tile_overlap_factor is from 0 to 0.99: got {self.tile_overlap_factor}.")
        time, *space = self.strides
        if self.use_temporal_tiling:
            self._check(self.temporal_tile_size, time, "frames")
        if self.use_spatial_tiling:
            self._check(self.spatial_tile_size, max(space), "pixels")

    def latent_tiles(self, latent_frames: int) -> list[int]:
        """Returns how many latent frames each temporal tile of a decode has."""
        span, first = _Span.of(*_axes(self)[0], encode=False), int(self.is_causal)
        if not self.use_temporal_tiling or latent_frames <= span.tile:
            return [latent_frames]
        starts = range(0, latent_frames - first, span.step)
        return [min(span.tile + first, latent_frames - start) for start in starts]

    def cuts_space(self, rows: int, columns: int, *, encode: bool = False) -> bool:
        """Returns whether a latent (to encode: a video) of so many rows and columns is larger than a tile in space."""
        _, *spans = (_Span.of(*axis, encode=encode) for axis in _axes(self))
        return self.use_spatial_tiling and any(n > span.tile for n, span in zip((rows, columns), spans, strict=True))

    def _check(self, size: int, stride: int, unit: str) -> None:
        whole = stride * Fraction(self.tile_overlap_factor).limit_denominator(1000).denominator
        if size < 1 or size % whole:
            raise ValueError(
                f"A tile that overlaps by {self.tile_overlap_factor} has a multiple of {whole} {unit} "
                f"(latents of {stride}): got {size}: use {max(1, round(size / whole)) * whole}."
            )


def tiled_encode(tiling: Tiling, video: Float[Array, "B T H W C"], encode_tile: OfTile) -> Float[Array, "B t h w Z"]:
    """Returns `encode_tile(video)`, tile by tile where the video is larger than a tile.

    `encode_tile` gives latents, or moments: of a posterior those are blended, never draws from it.
    """
    return join_frames(_parts(tiling, video, encode_tile, encode=True))


def tiled_decode(tiling: Tiling, latent: Float[Array, "B t h w Z"], decode_tile: OfTile) -> Float[Array, "B T H W C"]:
    """Returns `decode_tile(latent)`, tile by tile where the latent is larger than that of a tile."""
    return join_frames(decoded_parts(tiling, latent, decode_tile))


def decoded_parts(
    tiling: Tiling, latent: Float[Array, "B t h w Z"], decode_tile: OfTile
) -> Iterator[Float[Array, "B T H W C"]]:
    """Yields the frames of `tiled_decode` in parts: those that no further temporal tile changes, as each is ready."""
    return _parts(tiling, latent, decode_tile, encode=False)


def join_frames(parts: Iterable[Float[Array, "B T H W C"]]) -> Float[Array, "B T H W C"]:
    """Returns parts of a video as one."""
    first, *rest = parts
    return jnp.concatenate([first, *rest], TIME) if rest else first


class _Span(NamedTuple):
    """The tiles of one axis, counted in positions of what goes in (`tile`, `step`) and of what comes out."""

    tile: int
    step: int  # from one tile to the next
    overlap: int
    keep: int  # of each tile; the next one gives the rest

    @classmethod
    def of(cls, size: int, stride: int, factor: float, *, encode: bool) -> "_Span":
        latents = size // stride
        overlap = round(latents * factor)
        before, after = (stride, 1) if encode else (1, stride)
        return cls(latents * before, (latents - overlap) * before, overlap * after, (latents - overlap) * after)


def _axes(tiling: Tiling) -> list[tuple[int, int, float]]:
    sizes = (tiling.temporal_tile_size, tiling.spatial_tile_size, tiling.spatial_tile_size)
    return [(size, stride, tiling.tile_overlap_factor) for size, stride in zip(sizes, tiling.strides, strict=True)]


def _parts(tiling: Tiling, x: Array, run: OfTile, *, encode: bool) -> Iterator[Array]:
    """Time comes first; each of its tiles is cut in space like a video of its own."""
    time, rows, columns = (_Span.of(*axis, encode=encode) for axis in _axes(tiling))

    def in_space(x: Array) -> Array:
        if tiling.cuts_space(x.shape[ROWS], x.shape[COLUMNS], encode=encode):
            return _over_space(x, run, rows, columns)
        return run(x)

    if tiling.use_temporal_tiling and x.shape[TIME] > time.tile:
        return _over_time(x, in_space, time, first=int(tiling.is_causal))
    return iter([in_space(x)])


def _over_time(x: Array, run: OfTile, span: _Span, first: int) -> Iterator[Array]:
    """`first` is how many frames, 0 or 1, a tile has more because they stand for no others."""
    before = None
    for start in range(0, x.shape[TIME] - first, span.step):
        tile = run(_cut(x, {TIME: (start, span.tile + first)}))
        if start:
            tile = tile[:, first:]
        join = _Join(TIME, span.overlap, span.keep + (0 if start else first))
        part, (before,) = _joined(tile, (before,), (join,))
        del tile
        yield part


def _over_space(x: Array, run: OfTile, rows: _Span, columns: _Span) -> Array:
    """A tile is blended with the one above, then with the one on its left, both blended themselves and uncropped."""
    joins = _Join(ROWS, rows.overlap, rows.keep), _Join(COLUMNS, columns.overlap, columns.keep)
    tops, starts = range(0, x.shape[ROWS], rows.step), range(0, x.shape[COLUMNS], columns.step)
    cuts = [{ROWS: (top, rows.tile), COLUMNS: (start, columns.tile)} for top in tops for start in starts]
    tiles = _tiles(x, run, cuts)
    bands: list[Array] = []
    above: dict[int, Array] = {}
    for _ in tops:
        band, left = [], None
        for start in starts:
            part, (above[start], left) = _joined(next(tiles), (above.get(start), left), joins)
            band.append(part)
        bands.append(jnp.concatenate(band, COLUMNS))
    return jnp.concatenate(bands, ROWS)


def _tiles(x: Array, run: OfTile, tiles: Sequence[Tile]) -> Iterator[Array]:
    """Yields what tiles give, in their order; several devices take equal ones at once."""
    at_once = groups_at_once(get_abstract_mesh(), len(x))
    if at_once == 1:
        yield from (run(_cut(x, tile)) for tile in tiles)
        return
    equal: dict[tuple[int, ...], list[int]] = {}
    for number, tile in enumerate(tiles):
        equal.setdefault(_shape(x, tile), []).append(number)
    done: dict[int, Array] = {}
    for alike in equal.values():
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            cut = [_cut(x, tiles[number]) for number in some]
            found = run(one_each(cut + cut[-1:] * (at_once - len(cut))), each_alone=True)
            done |= {number: group_of(found, place, len(x)) for place, number in enumerate(some)}
    yield from (done.pop(number) for number in range(len(tiles)))


def _cut(x: Array, tile: Tile) -> Array:
    """Returns a tile of `x`."""
    starts = [tile[axis][0] if axis in tile else 0 for axis in range(x.ndim)]
    return jax.lax.dynamic_slice(x, starts, _shape(x, tile))  # one compile for all starts


def _shape(x: Array, tile: Tile) -> tuple[int, ...]:
    """Returns the shape of a tile of `x`, which is shorter at the border."""
    return tuple(min(tile[axis][1], n - tile[axis][0]) if axis in tile else n for axis, n in enumerate(x.shape))


class _Join(NamedTuple):
    """How much of a tile is blended and kept along an axis."""

    axis: int
    overlap: int
    keep: int


@partial(jax.jit, static_argnames="joins")
def _joined(tile: Array, before: tuple[Array | None, ...], joins: tuple[_Join, ...]) -> tuple[Array, list[Array]]:
    """Returns what is kept of a tile, and its ends for the next tiles, after blending with the ends before it."""
    for join, end in zip(joins, before, strict=True):
        if end is not None:
            tile = _blend(end, tile, join.axis)
    ends = [_end(tile, join.overlap, join.axis) for join in joins]
    for join in joins:
        tile = jax.lax.slice_in_dim(tile, 0, min(join.keep, tile.shape[join.axis]), axis=join.axis)
    return tile, ends


def _end(tile: Array, overlap: int, axis: int) -> Array:
    length = tile.shape[axis]
    return jax.lax.slice_in_dim(tile, max(0, length - overlap), length, axis=axis)


def _blend(before: Array, tile: Array, axis: int) -> Array:
    """Returns the tile, its start mixed with the end of the one before.

    The tile's share grows from 0 but does not reach 1; over fewer positions where either is shorter.
    """
    extent = min(before.shape[axis], tile.shape[axis])
    share = np.arange(extent).reshape([extent if i == axis else 1 for i in range(tile.ndim)]) / max(1, extent)
    start = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    mixed = _end(before, extent, axis) * jnp.float32(1 - share) + start * jnp.float32(share)
    rest = jax.lax.slice_in_dim(tile, extent, tile.shape[axis], axis=axis)
    return jnp.concatenate([mixed.astype(tile.dtype), rest], axis)
