from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.errors import DataError
from cskv.training.settings import TrainingSettings
from cskv.training.stream import SampleStream


def numbered(number: int) -> list[torch.Tensor]:
    """Sample i holds the token i twice."""
    return [torch.tensor([i, i]) for i in range(number)]


def steps_of(stream: SampleStream, accumulation: int, start: int, number: int) -> list[list[int]]:
    """The samples, by number, of each step of one process."""
    batches = stream.batches(start)
    return [[int(token) for _ in range(accumulation) for token in next(batches)[:, 0]] for _ in range(number)]


def test_epochs_follow_each_other_without_the_remainder() -> None:
    stream = SampleStream(numbered(5), TrainingSettings(batch_size=2, epochs=3))
    assert stream.total_steps == 6
    assert steps_of(stream, 1, 0, 6) == [[0, 1], [2, 3]] * 3


def test_processes_share_out_each_forward() -> None:
    settings = TrainingSettings(batch_size=1, accumulation=2)
    ranks = [SampleStream(numbered(8), settings, rank, 2) for rank in range(2)]
    assert [steps_of(stream, 2, 0, 2) for stream in ranks] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


@settings(max_examples=50, deadline=None)
@given(
    number=st.integers(1, 30),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 3),
    start=st.integers(0, 20),
)
def test_any_division_of_a_step_sees_the_same_samples_from_any_start(
    number: int, batch_size: int, accumulation: int, processes: int, start: int
) -> None:
    per_step = batch_size * accumulation * processes
    if number < per_step:
        return
    divided = TrainingSettings(batch_size=batch_size, accumulation=accumulation)
    whole = SampleStream(numbered(number), TrainingSettings(batch_size=per_step))
    every = steps_of(whole, 1, 0, start + 3)
    ranks = [SampleStream(numbered(number), divided, rank, processes) for rank in range(processes)]
    parts = [steps_of(stream, accumulation, start, 3) for stream in ranks]
    together = [sorted(sample for part in parts for sample in part[step]) for step in range(3)]
    assert together == [sorted(step) for step in every[start:]]


def test_a_source_that_can_skip_is_asked_to() -> None:
    class Skipping:
        asked: list[int] = []  # noqa: RUF012 (one instance)

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> None:
            raise AssertionError("iterated from the start")

        def starting_at(self, index: int):
            self.asked.append(index)
            return iter(numbered(4)[index:])

    samples = Skipping()
    stream = SampleStream(samples, TrainingSettings(epochs=2))  # type: ignore[arg-type]
    assert [int(batch[0, 0]) for batch in islice(stream.batches(3), 3)] == [3, 0, 1]
    assert samples.asked == [3, 0]


def test_max_steps_cuts_the_run() -> None:
    assert SampleStream(numbered(9), TrainingSettings(max_steps=4)).total_steps == 4
    assert SampleStream(numbered(3), TrainingSettings(max_steps=4)).total_steps == 3


def test_fewer_samples_than_a_step_needs_are_refused() -> None:
    settings = TrainingSettings(batch_size=2, accumulation=3)
    with pytest.raises(
        DataError, match=r"11 training samples; one step needs 12 \(2 processes x accumulation 3 x batch"
    ):
        SampleStream(numbered(11), settings, 0, 2)


def test_unequal_samples_in_a_batch_are_refused() -> None:
    stream = SampleStream([torch.tensor([1]), torch.tensor([1, 2])], TrainingSettings(batch_size=2))
    with pytest.raises(DataError, match=r"\[1, 2\] tokens; expected equal lengths"):
        next(stream.batches(0))


def test_the_fingerprint_tells_samples_apart() -> None:
    prints = {
        SampleStream(samples, TrainingSettings()).fingerprint()
        for samples in (numbered(3), numbered(4), numbered(4)[1:], numbered(3))
    }
    assert len(prints) == 3
