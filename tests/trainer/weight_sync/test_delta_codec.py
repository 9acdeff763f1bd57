"""What a weight delta promises: bit-exact whatever the bits are, and a named error where it cannot be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.weight_sync.errors import DeltaBaseError, DeltaCorruptError
from trainer.weight_sync.transports import delta_codec
from trainer.weight_sync.transports.delta_codec import apply_in_place, encode_delta, read_header

Weights = dict[str, torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.float8_e4m3fn)
SHAPES = st.lists(st.integers(0, 40), max_size=2).map(tuple)


def from_bits(bits: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(bits), dtype=torch.uint8).view(dtype).reshape(shape)


def bits_of(weights: Weights) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in weights.items()
    }


def apply_delta(base: Weights, blob: bytes, *, base_version: str) -> Weights:
    """Rebuild the new version from its base, which stays as it is."""
    entries = {entry.spec.name: entry for entry in read_header(blob).tensors}
    new = {
        name: tensor.detach().contiguous().clone() if name in entries and entries[name].changed else tensor
        for name, tensor in base.items()
    }
    apply_in_place(new, blob, base_version=base_version)
    return {name: new[name] for name in entries}


@st.composite
def tensor_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that share from none to all of their elements, of any bits: NaN, infinities, subnormals."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    size = int(np.prod(shape, dtype=int))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.001, 0.1, 0.7, 1.0]))
    old = random.integers(0, 256, (size, dtype.itemsize), dtype=np.uint8)
    other = random.integers(0, 256, old.shape, dtype=np.uint8)
    new = np.where(random.random((size, 1)) < share, other, old)
    return from_bits(old.tobytes(), dtype, shape), from_bits(new.tobytes(), dtype, shape)


def a_pair(share: float = 0.05) -> tuple[Weights, Weights]:
    generator = torch.Generator().manual_seed(0)
    base = {
        "embed": torch.randn(60, 40, generator=generator).bfloat16(),
        "norm": torch.ones(40, dtype=torch.bfloat16),
        "scale": torch.tensor(0.5),
    }
    steps = {
        name: (torch.rand(tensor.shape, generator=generator) < share).to(tensor.dtype) for name, tensor in base.items()
    }
    return base, {name: tensor + tensor * steps[name] / 128 for name, tensor in base.items()}


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(tensor_pairs(), max_size=4), block_elements=st.sampled_from([1, 97, 2**20]))
def test_any_pair_round_trips_bit_for_bit(pairs: list[tuple[torch.Tensor, torch.Tensor]], block_elements: int) -> None:
    base = {f"t{i}": old for i, (old, _) in enumerate(pairs)}
    new = {f"t{i}": tensor for i, (_, tensor) in enumerate(pairs)}
    before = bits_of(base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_codec, "BLOCK_ELEMENTS", block_elements)
        blob = encode_delta(base, new, base_version="1", version="2")
        result = apply_delta(base, blob, base_version="1")
        undo = apply_in_place(base, blob, base_version="1")

    assert bits_of(result) == bits_of(base) == bits_of(new)
    undo()
    assert bits_of(base) == before


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 2000])
def test_gaps_of_every_length_survive(gap: int) -> None:
    base = {"w": torch.zeros(5000)}
    new = {"w": torch.zeros(5000)}
    new["w"][gap] = new["w"][2 * gap + 1] = 1.0

    result = apply_delta(base, encode_delta(base, new, base_version="1", version="2"), base_version="1")

    assert torch.equal(result["w"], new["w"])


def test_a_zero_that_changes_its_sign_and_a_nan_that_changes_its_payload_are_changes() -> None:
    base = {"w": torch.tensor([0.0, float("nan"), 1.0])}
    new = {"w": torch.tensor([-0.0, float("nan"), 1.0])}
    new["w"].view(torch.int32)[1] += 1

    blob = encode_delta(base, new, base_version="1", version="2")

    assert read_header(blob).changed == 2
    assert bits_of(apply_delta(base, blob, base_version="1")) == bits_of(new)


def test_nothing_changed_costs_only_the_header_and_copies_nothing() -> None:
    base, _ = a_pair()

    blob = encode_delta(base, base, base_version="1", version="2")
    result = apply_delta(base, blob, base_version="1")

    assert (read_header(blob).body_bytes, read_header(blob).changed) == (0, 0)
    assert all(result[name] is base[name] for name in base)


def test_steps_of_one_unit_in_the_last_place_cost_a_byte_an_element_at_most() -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(400_000, generator=generator).bfloat16()}
    up = torch.rand(400_000, generator=generator) < 0.05
    new = {"w": (base["w"].view(torch.int16) + up).view(torch.bfloat16)}

    blob = encode_delta(base, new, base_version="1", version="2")

    assert len(blob) < int(up.sum())


def test_noise_is_never_much_larger_than_the_tensors_themselves() -> None:
    generator = torch.Generator().manual_seed(2)
    base = {"w": torch.zeros(100_000, dtype=torch.int16)}
    new = {"w": torch.randint(-(2**15), 2**15, (100_000,), generator=generator, dtype=torch.int16)}

    assert len(encode_delta(base, new, base_version="1", version="2")) < 200_000 + 500


def test_tensors_that_do_not_lie_end_to_end_in_memory_are_read_in_order() -> None:
    base = {"w": torch.arange(12.0).view(3, 4).T}
    new = {"w": (torch.arange(12.0).view(3, 4) + torch.eye(3, 4)).T}

    result = apply_delta(base, encode_delta(base, new, base_version="1", version="2"), base_version="1")

    assert torch.equal(result["w"], new["w"])


def test_a_base_of_another_version_is_refused_by_both_names() -> None:
    base, new = a_pair()
    blob = encode_delta(base, new, base_version="7", version="8")

    with pytest.raises(DeltaBaseError, match=r"base is version '7', held is version '6'"):
        apply_delta(base, blob, base_version="6")


def test_a_base_that_only_claims_to_be_the_version_is_refused() -> None:
    base, new = a_pair()
    blob = encode_delta(base, new, base_version="7", version="8")
    impostor = base | {"norm": base["norm"].clone()}
    impostor["norm"][3] = 1.0078125  # one unit in the last place
    before = bits_of(impostor)

    for apply in (apply_delta, apply_in_place):
        with pytest.raises(DeltaBaseError, match="'norm' comes out with another checksum"):
            apply(impostor, blob, base_version="7")
    # "embed" comes before it and had been changed already.
    assert bits_of(impostor) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda base: base.pop("norm"),
        lambda base: base.update(norm=base["norm"].float()),
        lambda base: base.update(norm=base["norm"][:20]),
    ],
    ids=["missing", "dtype", "shape"],
)
def test_a_base_of_another_layout_is_refused(change: Callable[[Weights], object]) -> None:
    base, new = a_pair()
    blob = encode_delta(base, new, base_version="7", version="8")
    change(base)

    with pytest.raises(DeltaBaseError, match="'norm'"):
        apply_delta(base, blob, base_version="7")
    with pytest.raises(DeltaBaseError, match="'norm'"):
        encode_delta(base, new, base_version="7", version="8")


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_noticed(where: float, flip: int) -> None:
    base, new = a_pair()
    blob = bytearray(encode_delta(base, new, base_version="1", version="2"))
    blob[int(where * len(blob))] ^= flip

    with pytest.raises(DeltaCorruptError):
        apply_delta(base, bytes(blob), base_version="1")


@given(where=st.floats(0, 1, exclude_max=True))
def test_a_blob_cut_anywhere_is_noticed(where: float) -> None:
    base, new = a_pair()
    blob = encode_delta(base, new, base_version="1", version="2")

    with pytest.raises(DeltaCorruptError):
        apply_delta(base, blob[: int(where * len(blob))], base_version="1")


def test_what_was_appended_is_noticed() -> None:
    base, new = a_pair()

    with pytest.raises(DeltaCorruptError, match="bytes of"):
        apply_delta(base, encode_delta(base, new, base_version="1", version="2") + b"x", base_version="1")
