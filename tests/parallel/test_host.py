"""What goes to host memory comes back bit for bit, in places that are kept."""

import torch

from src.parallel.host import HostBuffer, HostCopies, Offload, storages_of

CPU = torch.device("cpu")


def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "bytes": torch.randint(0, 255, (11,), dtype=torch.uint8, generator=generator),
        "number": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }


def test_places_are_apart_and_as_large_as_asked_for_at_least():
    sizes = [1, 64, 0, 65, 1000]
    buffer = HostBuffer(sizes, CPU)
    assert [len(place) >= size for place, size in zip(buffer.places, sizes)] == [True] * 5
    assert sum(map(len, buffer.places)) <= sum(sizes) + 63 * len(sizes)
    for number, place in enumerate(buffer.places):
        place.fill_(number)
    for number, place in enumerate(buffer.places):
        assert (place == number).all() and place.data_ptr() % 64 == 0


def test_copies_are_the_tensors_and_kept_memory_is_used_again():
    tensors = drawn()
    for copies in (HostCopies(CPU), HostCopies(CPU, keep=True)):
        first = copies.of("model", tensors)
        assert list(first) == list(tensors)
        for key, x in tensors.items():
            assert torch.equal(first[key], x) and first[key].dtype == x.dtype, key
            assert first[key].is_contiguous()
            assert not x.numel() or first[key].data_ptr() != x.data_ptr(), key
        other = copies.of("other", tensors)
        again = copies.of("model", {key: x + 1 for key, x in tensors.items()})
        for key, x in tensors.items():
            assert torch.equal(again[key], x + 1) and torch.equal(other[key], x)
            is_same = again[key].data_ptr() == first[key].data_ptr()
            assert not x.numel() or is_same == copies.keep
        larger = {key: torch.cat((x.flatten(), x.flatten())) for key, x in tensors.items()}
        found = copies.of("model", larger)
        assert all(torch.equal(found[key], x) for key, x in larger.items())


def test_storages_go_and_come_back_to_the_same_tensors():
    tensors, host = drawn(), Offload(CPU)
    view, before = tensors["odd"][1], {key: x.clone() for key, x in tensors.items()}
    storages = storages_of(tensors.values())
    for _ in range(2):
        host.send(storages)
        assert all(storage.nbytes() == 0 for storage in storages.values())
        assert host.away.keys() == storages.keys()
        assert host.size_of(storages) == sum(x.nbytes for x in before.values())
        places = {key: place.data_ptr() for key, (place, _) in host.places.items()}
        host.begin_to_fetch(list(storages))
        host.arrived()
        assert all(torch.equal(tensors[key], x) for key, x in before.items())
        assert torch.equal(view, before["odd"][1]) and not host.away
        tensors["odd"].mul_(2)
        before["odd"].mul_(2)
    host.send(storages)
    assert places == {key: place.data_ptr() for key, (place, _) in host.places.items()}, "kept"
    host.forget_all_but([next(iter(storages))])
    assert len(host.places) == 1
