"""A record of another thread count is a first guess, also where this thread count's space does not offer it."""

from __future__ import annotations

from graphopt.targets.schedules import Choice
from graphopt.targets.schedules.workload import Machine, Workload
from graphopt.targets.tuning.cost_model import Cost
from graphopt.targets.tuning.database import Key, Record
from graphopt.targets.tuning.task import Task

OFFERED = [Choice("winograd", {"tile": 4, "chunk": 49}), Choice("conv2d_blocked", {"rows": 1, "columns": 14})]


def _task() -> Task:
    cost = Cost(1 << 20, 1 << 10, 1 << 10, "float32")
    workload = Workload(None, Machine(16, 32, 2))
    return Task(["conv"], workload, (), OFFERED, Key("digest", "avx512-amx", 2), 1, cost)


def _record(choice: Choice) -> Record:
    return Record(choice.template, 1, choice.decision, 12.5, 8, True)


def test_a_decision_that_is_not_offered_joins_the_space():
    task, known = _task(), Choice("winograd", {"tile": 4, "chunk": 98})
    task.borrow(_record(known))
    assert task.choice == known
    assert task.next_position() == 2
    assert _task().choices == OFFERED  # the list that other tasks share is left alone


def test_a_decision_that_is_offered_keeps_its_place():
    task = _task()
    task.borrow(_record(OFFERED[1]))
    assert task.choice == OFFERED[1]
    assert task.next_position() == 1
    assert len(task.choices) == 2


def test_a_record_that_no_template_could_have_made_is_left_alone():
    task = _task()
    task.borrow(_record(Choice("winograd", {"columns": 99})))
    assert task.choices == OFFERED
    assert task.hints == []
