"""deploy/launch.py: what it ends with, and how long it waits where it cannot ask."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from deploy import launch


def failure(code: int, seconds: int) -> ProcessFailure:
    """Of a rank that ended with the code, so many seconds after the others."""
    process_failure = ProcessFailure(0, 1, code, "<N/A>")
    process_failure.timestamp = 1000 + seconds
    return process_failure


@pytest.mark.parametrize(
    "codes, ends",
    [
        ([75, 75], 75),
        ([75, -15], 75),  # torchrun ends the others when one has ended
        ([-15, 75], 75),
        ([2, -15], 2),
        ([-15, 2], 2),
        ([1, -15], 1),
        ([-9, 1], 137),  # the others fail because of it
        ([134], 134),
    ],
)
def test_a_launcher_ends_with_what_its_ranks_end_with(codes, ends):
    assert launch.exit_code([failure(code, i) for i, code in enumerate(codes)]) == ends


def test_a_lost_connection_is_no_failure_for_a_minute(monkeypatch):
    """While the ranks end by themselves; then it is."""
    answers = iter([3, RendezvousConnectionError(), RendezvousConnectionError()])
    clock = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])

    def num_nodes_waiting(handler):
        answer = next(answers, RendezvousConnectionError())
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked = launch.patient(num_nodes_waiting)
    assert asked(None) == 3
    assert asked(None) == 0
    clock[0] += 59
    assert asked(None) == 0
    clock[0] += 2
    with pytest.raises(RendezvousConnectionError):
        asked(None)
