"""Messages that wait for a worker: order, places, and the same few steps however many wait."""

import sys

from simulations.engines.waiting import WaitingJobs


def taken(jobs, slot, count):
    return [jobs.take(slot) for _ in range(count)]


def test_jobs_come_in_order_and_a_hospital_has_one_at_a_time():
    jobs = WaitingJobs()
    for job in ("first", "second"):
        jobs.add(1, job)
    jobs.add(2, "other")
    assert taken(jobs, 0, 3) == ["first", "other", None]
    jobs.done(1)
    assert jobs.take(1) == "second"
    assert len(jobs) == 0


def test_a_slot_gets_the_hospitals_that_it_knows_and_helps_the_fullest_other():
    jobs = WaitingJobs()
    for hospital in (1, 2, 3):
        jobs.add(hospital, hospital)
    assert [jobs.take(0), jobs.take(1), jobs.take(1)] == [1, 2, 3]
    for hospital in (1, 2, 3):
        jobs.done(hospital)
        jobs.add(hospital, hospital)
    assert jobs.take(1) == 2
    assert jobs.take(0) == 1
    assert jobs.take(0) == 3
    assert jobs.take(1) is None


def test_nothing_is_left_after_clear():
    jobs = WaitingJobs()
    jobs.add(1, "a")
    jobs.clear()
    assert jobs.take(0) is None
    jobs.add(1, "b")
    assert jobs.take(0) == "b"


def lines_run(work) -> int:
    """Lines of Python that `work` runs."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_job_costs_the_same_among_ten_and_among_ten_thousand():
    def cost(hospitals):
        jobs = WaitingJobs()
        for hospital in range(hospitals):
            jobs.add(hospital, hospital)
        return lines_run(lambda: [jobs.done(jobs.take(number % 2)) for number in range(8)])

    assert cost(10) == cost(10_000)
