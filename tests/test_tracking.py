"""Live metrics: each step once, whatever the server does, and training never waits for it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clones
import pytest

from regraft.artifacts import write_json
from regraft.errors import Preempted
from regraft.layout import Layout
from regraft.register.params import RegisterParams
from regraft.register.registry import register
from regraft.register.service import Service
from regraft.tracking import TAG, Curve, MetricsTail, training_key

KEY = "a1b2" * 16


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def layout(empty_store: Path, tmp_path: Path) -> Layout:
    """A clone with an empty store, in which nothing was trained yet."""
    clones.copy_store(empty_store, tmp_path)
    return Layout(tmp_path)


def steps(*numbers: int) -> list[dict[str, float]]:
    return [{"step": n, "epoch": n / 10, "loss": 1 / n, "grad_norm": 1.0, "learning_rate": 1e-3} for n in numbers]


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def tail(layout: Layout, **what: Any) -> MetricsTail:
    return MetricsTail(clones.PARAMS, layout, poll=0.05, **what)


def run_of(layout: Layout, key: str = KEY) -> Any:
    client = Service.of(clones.PARAMS, layout).client
    experiment = client.get_experiment_by_name("regraft")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TAG}` = '{key}'")
    return run


def logged(layout: Layout, name: str = "loss") -> list[tuple[int, float]]:
    client = Service.of(clones.PARAMS, layout).client
    found = client.get_metric_history(run_of(layout).info.run_id, name)
    return sorted((each.step, each.value) for each in found)


def test_steps_are_in_mlflow_while_training_runs(layout: Layout) -> None:
    with tail(layout) as following:
        clones.live(layout, KEY, steps(1, 2))
        until(lambda: following.run_id is not None and following.unsent == 0)
        assert run_of(layout).info.status == "RUNNING"
        assert [step for step, _ in logged(layout)] == [1, 2]
    assert following.run_id == run_of(layout).info.run_id


def test_at_the_end_every_value_of_every_step_is_there_once(layout: Layout) -> None:
    with tail(layout) as following:
        clones.live(layout, KEY, steps(1, 2))
        until(lambda: following.run_id is not None)
        clones.live(layout, KEY, steps(1, 2, 3, 4))
    assert following.unsent == 0
    assert logged(layout) == [(n, 1 / n) for n in (1, 2, 3, 4)]
    assert [step for step, _ in logged(layout, "learning_rate")] == [1, 2, 3, 4]
    assert run_of(layout).info.status == "FINISHED"


def test_a_resumed_training_goes_on_in_the_same_run_and_repeats_no_step(layout: Layout) -> None:
    clones.live(layout, KEY, steps(1, 2, 3))
    with pytest.raises(Preempted), tail(layout):
        raise Preempted("stopped")
    assert run_of(layout).info.status == "KILLED"
    clones.live(layout, KEY, steps(1, 2))
    with tail(layout) as following:
        time.sleep(0.2)
        clones.live(layout, KEY, steps(1, 2, 3, 4))
    assert following.unsent == 0
    assert [step for step, _ in logged(layout)] == [1, 2, 3, 4]
    assert run_of(layout).info.status == "FINISHED"


def speeds(layout: Layout, *numbers: int) -> None:
    """Append to `speed.jsonl`, as the trainer does; it is never cut, so a resume repeats steps."""
    with (layout.checkpoints / KEY[:16] / "speed.jsonl").open("a") as file:
        for n in numbers:
            line = {"step": n, "tokens_per_second": 100.0 * n, "useful_tokens_per_second": 90.0 * n, "mfu": None}
            file.write(json.dumps(line) + "\n")


def test_speed_and_memory_are_in_mlflow_live_each_step_once_however_often_it_was_trained(layout: Layout) -> None:
    clones.live(layout, KEY, steps(1, 2, 3))
    speeds(layout, 2, 3)
    with pytest.raises(Preempted), tail(layout):
        raise Preempted("stopped")
    speeds(layout, 3)  # again, after the resume
    with tail(layout) as following:
        speeds(layout, 4)
        until(lambda: following.run_id is not None and following.unsent == 0)
        clones.live(layout, KEY, steps(1, 2, 3, 4))
    assert logged(layout, "speed/tokens_per_second") == [(2, 200.0), (3, 300.0), (4, 400.0)]
    assert logged(layout, "speed/useful_tokens_per_second") == [(2, 180.0), (3, 270.0), (4, 360.0)]
    assert "speed/mfu" not in run_of(layout).data.metrics  # of a CPU
    assert [step for step, _ in logged(layout)] == [1, 2, 3, 4]


def test_a_failed_training_ends_its_run_as_failed(layout: Layout) -> None:
    clones.live(layout, KEY, steps(1))
    with pytest.raises(ValueError, match="broken"), tail(layout):
        raise ValueError("broken")
    assert run_of(layout).info.status == "FAILED"


def test_an_answer_lost_after_the_server_had_committed_repeats_no_step(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    ask = Service.ask

    def lossy(self: Service, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = ask(self, method, *args, **kwargs)
        if method == "log_batch" and not lost:
            lost.append(method)
            raise self.unavailable("the answer was lost")
        return answer

    monkeypatch.setattr(Service, "ask", lossy)
    with tail(layout):
        clones.live(layout, KEY, steps(1, 2))
        until(lambda: bool(lost))
        clones.live(layout, KEY, steps(1, 2, 3))
    assert [step for step, _ in logged(layout)] == [1, 2, 3]


def test_what_an_outage_kept_back_is_sent_by_the_next_tail(layout: Layout) -> None:
    clones.live(layout, KEY, steps(1, 2))
    away = RegisterParams(tracking_uri="http://127.0.0.1:9")
    with MetricsTail(away, layout, poll=0.05) as following:
        pass
    assert following.unsent == 2
    with tail(layout):
        pass
    assert [step for step, _ in logged(layout)] == [1, 2]


def test_what_an_outage_kept_back_is_sent_by_register(layout: Layout) -> None:
    clones.make(layout.root)
    clones.live(layout, KEY, clones.STEPS)
    with MetricsTail(RegisterParams(tracking_uri="http://127.0.0.1:9"), layout, poll=0.05):
        pass
    version = register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    assert run_of(layout).info.run_id == version.run_id
    assert [step for step, _ in logged(layout)] == [1, 2, 3, 4, 5]


def test_the_run_that_followed_the_training_is_the_run_of_the_version(layout: Layout) -> None:
    clones.make(layout.root)
    with tail(layout) as following:
        clones.live(layout, KEY, clones.STEPS)
    version = register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    assert version.run_id == following.run_id
    assert [step for step, _ in logged(layout)] == [1, 2, 3, 4, 5]


def test_another_training_gets_a_run_of_its_own(layout: Layout) -> None:
    other = "ffff" * 16
    with tail(layout) as following:
        clones.live(layout, KEY, steps(1))
        until(lambda: following.run_id is not None)
        clones.live(layout, other, steps(1, 2))
    assert [step for step, _ in logged(layout)] == [1]
    assert run_of(layout).info.status == "KILLED"
    assert run_of(layout, other).info.status == "FINISHED"


def test_a_server_that_hangs_costs_training_nothing_and_its_end_a_bounded_time(layout: Layout, hanging: str) -> None:
    clones.live(layout, KEY, steps(1))
    with MetricsTail(RegisterParams(tracking_uri=hanging), layout, poll=0.05, last_word=1.0) as following:
        started = time.monotonic()
        for _ in range(20):
            time.sleep(0.01)  # a step
        assert time.monotonic() - started < 2
        ended = time.monotonic()
    assert time.monotonic() - ended < 3
    assert following.unsent == 1


def test_with_nothing_to_send_mlflow_is_not_even_imported(layout: Layout) -> None:
    clones.live(layout, KEY, steps(1))
    with tail(layout):
        pass
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom regraft.layout import Layout\n"
        "from regraft.register.params import RegisterParams\nfrom regraft.tracking import MetricsTail\n"
        f"with MetricsTail(RegisterParams(), Layout(Path({str(layout.root)!r})), poll=0.05) as tail: time.sleep(0.3)\n"
        "print(tail.unsent, 'mlflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 False\n"


def test_a_line_that_is_not_whole_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curve = Curve(path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    curve.read()
    assert curve.steps == {1: {"loss": 2.0}}
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    curve.read()
    assert curve.steps == {1: {"loss": 2.0}, 2: {"loss": 1.0}}


def test_a_file_that_was_cut_and_grew_past_its_old_end_is_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curve = Curve(path)
    path.write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in (1, 2, 3)))
    curve.read()
    path.write_text("".join(f'{{"step": {n}, "loss": 2.0}}\n' for n in (1, 2, 3, 4, 5)))
    curve.read()
    assert curve.steps == {n: {"loss": 2.0} for n in (1, 2, 3, 4, 5)}


def test_a_loss_that_is_not_a_number_is_kept_and_a_broken_line_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curve = Curve(path)
    path.write_text('{"step": 1, "loss": NaN}\nbroken\n[1]\n{"loss": 1.0}\n{"step": 2, "loss": 1.0, "note": "x"}\n')
    curve.read()
    assert [sorted(curve.steps), curve.steps[2]] == [[1, 2], {"loss": 1.0}]
    assert curve.steps[1]["loss"] != curve.steps[1]["loss"]


def test_a_training_is_told_from_another_by_its_curve(tmp_path: Path) -> None:
    layout = clones.make(tmp_path)
    assert training_key(layout) is None
    clones.live(layout, KEY, clones.STEPS)
    assert training_key(layout) == KEY
    clones.live(layout, KEY, steps(1))
    assert training_key(layout) is None
    write_json(layout.checkpoints / "current.json", {"key": "../../x"})
    assert training_key(layout) is None


def test_the_note_of_what_was_sent_is_small(layout: Layout) -> None:
    clones.live(layout, KEY, steps(*range(1, 400)))
    with tail(layout):
        pass
    (note,) = (layout.work / "tracking").glob("*.json")
    found = json.loads(note.read_bytes())
    assert (found["key"], found["last"], found["status"]) == (KEY, 399, "FINISHED")
    assert len(logged(layout)) == 399
