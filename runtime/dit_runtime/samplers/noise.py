"""PyTorch's noise from numpy alone: the same seed gives the same image.

``torch.randn(shape, generator=generator)`` on the CPU is a Mersenne Twister (MT19937) and a Box-Muller transform in
float32 (``aten/src/ATen/native/cpu/DistributionTemplates.h``, ``core/DistributionsHelper.h``). On CUDA it is Philox
4x32-10 and curand's Box-Muller (``native/cuda/DistributionTemplates.h``, ``curand_normal.h``). Both are as in PyTorch
2.13. Earlier versions drew 16 and more float16 values on the CPU in half precision, which is not reproduced here.

The uniform words are PyTorch's, bit for bit; logarithm, sine and cosine are numpy's. The result therefore differs from
PyTorch's by at most (``tests/runtime/samplers/test_noise.py`` measures it):

- ``TorchNoise``, float32: 9.5e-7, two units in the last place of values above 4 (seed 735). float16: one unit in the
  last place, where float32's difference crosses a rounding boundary: 4 of 100 000 values.
- ``CudaNoise``: 9.6e-7 from published values that have every digit, and nothing from published values with fewer
  digits. It was not compared with a device, where more is possible: ``__sincosf`` is approximated in hardware.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from dit_runtime.core.errors import SamplingError

Float32 = NDArray[np.float32]
UInt64 = NDArray[np.uint64]

VECTOR = 16  # on the CPU, draws of at least this many values take PyTorch's vectorized path
TOGETHER = 4096  # values of several streams that are drawn at once; more would overflow the processor's caches
LEAST_SEED, MOST_SEED = -(1 << 63), (1 << 64) - 1  # of torch.Generator.manual_seed
BLOCK = 256  # CUDA threads of a block
ANY_DEVICE = 4096  # CUDA threads resident on any device of at least four multiprocessors

PHILOX_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # Salmon et al. 2011, "Parallel Random Numbers"
PHILOX_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)  # they split a word of 64 bits in two
PER_WORD = float(np.float32(2.3283064e-10))  # curand's CURAND_2POW32_INV
TURN_PER_WORD = float(np.float32(2.3283064e-10) * np.float32(6.2831855))  # curand's CURAND_2POW32_INV_2PI


class Noise(Protocol):
    """A stream of normal noise. Each image has its own stream, so that it does not depend on its batch."""

    def normal(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The next ``torch.randn(shape, dtype=dtype)``; raises SamplingError unless float32 or float16."""
        ...


def draw_normals(streams: Sequence[Noise], shape: Sequence[int]) -> Float32:
    """The next noise of each stream, float32 ``[N, *shape]``, with the bits of each stream's ``normal(shape)``.

    Streams of one kind are drawn together, since small images cost mostly the call.
    """
    size = math.prod(shape)
    at_once = max(1, TOGETHER // max(1, size))
    if len(streams) > at_once:
        groups = (streams[first : first + at_once] for first in range(0, len(streams), at_once))
        return np.concatenate([draw_normals(group, shape) for group in groups])
    cpu = [stream for stream in streams if type(stream) is TorchNoise]
    cuda = [stream for stream in streams if type(stream) is CudaNoise]
    if size >= VECTOR and 0 < len(cpu) == len(streams):
        values = _box_muller(np.stack([stream._draw_uniform(size, np.dtype(np.float32)) for stream in cpu]), size)
    elif size and 0 < len(cuda) == len(streams) and len({stream._threads for stream in cuda}) == 1:
        values = _curand_normals(cuda, size)
    else:
        values = np.array([stream.normal(shape) for stream in streams], np.float32)
    return values.reshape(len(streams), *shape)


def noise_hash(noise: ArrayLike) -> str:
    """The identity of noise in a record: 16 hexadecimal digits of SHA-256 over its little-endian float32 in C order."""
    return hashlib.sha256(np.asarray(noise, "<f4").tobytes()).hexdigest()[:16]


def check_seed(seed: object) -> int:
    """A seed that ``torch.Generator().manual_seed`` accepts, as it is. A negative one stands for itself plus 2⁶⁴.

    Raises:
        SamplingError: the seed is no whole number, or is outside ``LEAST_SEED`` to ``MOST_SEED``.
    """
    expected = "expected a whole number from -2^63 to 2^64-1, as torch.Generator.manual_seed takes"
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise SamplingError(f"seed {seed!r:.80}: {expected}")
    number = int(seed)
    if not LEAST_SEED <= number <= MOST_SEED:
        shown = str(number) if number.bit_length() <= 128 else f"of {number.bit_length()} bits"
        raise SamplingError(f"seed {shown}: {expected}")
    return number


class TorchNoise:
    """The CPU's stream: ``torch.Generator().manual_seed(seed)`` and consecutive ``torch.randn``.

    Raises SamplingError for a seed that PyTorch refuses.
    """

    def __init__(self, seed: int) -> None:
        seed = check_seed(seed)
        self._twister = np.random.MT19937(0)
        # PyTorch seeds its twister with the low 32 bits, as RandomState does; numpy's other way differs.
        np.random.RandomState(self._twister).seed(seed & 0xFFFFFFFF)
        self._waiting: float | None = None

    def normal(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        size, dtype = math.prod(shape), _check_dtype(dtype)
        values = _box_muller(self._draw_uniform(size, dtype), size) if size >= VECTOR else self._draw_singly(size)
        return values.reshape(shape).astype(dtype, copy=False)

    def _draw_words(self, count: int) -> UInt64:
        """The next 32-bit words."""
        return np.asarray(self._twister.random_raw(count), np.uint64)

    def _draw_uniform(self, size: int, dtype: np.dtype[Any]) -> Float32:
        """Uniform numbers in [0, 1) for ``size`` values: whole vectors, and one for the last 16 of a ragged size."""
        whole = size - size % VECTOR
        if whole == size:
            words = self._draw_words(size)
        else:  # the last 16 values have their own words, after those of all values (float32) or whole vectors (float16)
            drawn = self._draw_words((size if dtype == np.float32 else whole) + VECTOR)
            words = np.concatenate([drawn[:whole], drawn[-VECTOR:]])
        return (words & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _draw_singly(self, size: int) -> Float32:
        values = np.empty(size, np.float32)
        for index in range(size):
            if self._waiting is not None:
                values[index], self._waiting = self._waiting, None
                continue
            words = self._draw_words(4)
            doubles = ((words[0::2] << HALF) | words[1::2]) & np.uint64((1 << 53) - 1)
            first, second = (float(value) / (1 << 53) for value in doubles)
            radius = math.sqrt(-2 * math.log1p(-second))
            values[index] = radius * math.cos(2 * math.pi * first)
            self._waiting = radius * math.sin(2 * math.pi * first)
        return values


class CudaNoise:
    """The CUDA stream: ``torch.Generator("cuda").manual_seed(seed)`` and consecutive ``torch.randn(device="cuda")``.

    Arguments:
        seed: one that ``check_seed`` accepts.
        resident_threads: ``multi_processor_count * max_threads_per_multi_processor`` of the device, as
            ``torch.cuda.get_device_properties()`` has them. A draw of more values than threads depends on this number,
            since each thread then draws again. None stands for any device of four or more multiprocessors: a draw of
            more than 4096 values, which could depend on the device, then raises SamplingError.

    Draws of 2 GiB and more, which PyTorch splits, are not reproduced.
    """

    def __init__(self, seed: int, resident_threads: int | None = None) -> None:
        if resident_threads is not None and (resident_threads < BLOCK or resident_threads % BLOCK):
            raise SamplingError(
                f"resident_threads is {resident_threads}, expected a positive multiple of {BLOCK}: "
                "the device's multi_processor_count × max_threads_per_multi_processor"
            )
        self._key = check_seed(seed) & MOST_SEED
        self._threads = resident_threads
        self._counter = 0  # of Philox blocks; PyTorch's offset counts their four words

    def normal(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        size, dtype = math.prod(shape), _check_dtype(dtype)
        values = _curand_normals([self], size) if size else np.empty(0, np.float32)  # an empty draw moves nothing
        return values.reshape(shape).astype(dtype, copy=False)

    def _count_threads(self, size: int) -> int:
        """Threads that draw ``size`` values; raises SamplingError where their number depends on a device not given."""
        if self._threads is None and size > ANY_DEVICE:
            raise SamplingError(
                f"a CUDA draw of {size} values depends on the device above {ANY_DEVICE}: give resident_threads, the "
                "device's multi_processor_count × max_threads_per_multi_processor"
            )
        return min(size, self._threads or ANY_DEVICE)

    def _advance(self, blocks: int) -> int:
        counter = self._counter
        self._counter += blocks
        return counter


def _check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float16):
        raise SamplingError(f"noise is drawn in float32 or float16, got {dtype}")
    return dtype


def _box_muller(uniform: Float32, size: int) -> Float32:
    """``[..., whole vectors]`` of 16 uniforms, eight radii and eight angles, → ``[..., size]`` normals."""
    vectors = uniform.reshape(-1, 2, VECTOR // 2)
    # float32 where PyTorch rounds to float32: the rounding of the angle alone changes the result by 7e-7.
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - vectors[:, 0])).astype(np.float64)
    angle = (np.float32(2 * np.pi) * vectors[:, 1]).astype(np.float64)
    pairs = np.empty(vectors.shape, np.float32)
    pairs[:, 0], pairs[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
    values = pairs.reshape(uniform.shape)
    if size % VECTOR:
        return np.concatenate([values[..., : size - VECTOR], values[..., -VECTOR:]], axis=-1)
    return values


def _curand_normals(streams: Sequence[CudaNoise], size: int) -> Float32:
    """The next float32 ``[N, size]`` of streams with equal threads: PyTorch's ``distribution_nullary_kernel``.

    Each thread turns its own Philox block into four normals, stores them one launch apart, and takes its next block.
    A draw with a thread for every value therefore uses only the first normal of each block.
    """
    threads = streams[0]._count_threads(size)
    rounds = -(-size // (4 * threads))
    first = np.array([stream._advance(rounds) for stream in streams], np.uint64)
    block = first[:, None, None] + np.arange(rounds, dtype=np.uint64)[:, None]  # (N, rounds, 1)
    thread = np.arange(threads, dtype=np.uint64)
    key = np.array([stream._key for stream in streams], np.uint64)[:, None, None]
    words = _philox((block & LOW, block >> HALF, thread, np.zeros_like(thread)), (key & LOW, key >> HALF))
    values: list[NDArray[np.float64]] = []
    for radius_word, angle_word in (words[:2], words[2:]) if size > 2 * threads else (words[:2],):
        radius = np.sqrt(-2 * np.log(_scale_words(radius_word, PER_WORD)))
        angle = _scale_words(angle_word, TURN_PER_WORD)
        values += [radius * np.sin(angle), radius * np.cos(angle)] if size > threads else [radius * np.sin(angle)]
    normal = np.stack(values, axis=2).astype(np.float32)  # (N, rounds, 4, threads)
    return normal.reshape(len(streams), -1)[:, :size]


def _scale_words(words: UInt64, scale: float) -> NDArray[np.float64]:
    """(words + ½)·scale, rounded to float32 where curand rounds: the word, and the result of the fused multiply-add."""
    return (words.astype(np.float32).astype(np.float64) * scale + scale / 2).astype(np.float32).astype(np.float64)


def _philox(counter: tuple[UInt64, UInt64, UInt64, UInt64], key: tuple[UInt64, UInt64]) -> tuple[UInt64, ...]:
    """Philox 4x32-10: four words of 32 bits, each in a 64-bit array; the arrays and the key broadcast."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        p, q = PHILOX_MULTIPLIERS[0] * a, PHILOX_MULTIPLIERS[1] * c
        a, b, c, d = (q >> HALF) ^ b ^ low, q & LOW, (p >> HALF) ^ d ^ high, p & LOW
        low, high = (low + PHILOX_KEY_STEPS[0]) & LOW, (high + PHILOX_KEY_STEPS[1]) & LOW
    return a, b, c, d
