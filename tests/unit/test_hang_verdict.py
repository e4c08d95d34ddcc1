"""The hang doctor's judgement and report, without processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from deepspeed.comm import doctor
from deepspeed.comm.doctor import evidence, record
from deepspeed.comm.doctor.blackbox import make_page, open_page
from deepspeed.comm.doctor.verdict import Kind, Sight, State, Status, Verdict, blame, judge, report

T = 10.0


def sight(rank, state=State.WAITING, *, unmoved=5.0, silent=0.0, fresh=True, **said) -> Sight:
    said = {
        "step": 12,
        "phase": "forward",
        "module": "blocks.3",
        "parameter": "blocks.3.weight",
        "op": "all_gather",
        "nbytes": 4096,
        "count": 57,
        "beat": 3,
        **said,
    }
    if state is State.WAITING:
        said = {"waits_for": said["op"], "waited_s": 6.0, **said}
    return Sight(Status(rank, state, **said), unmoved, silent, fresh)


def judged(*sights: Sight, world: int | None = None, timeout_s: float = T) -> Verdict:
    return judge({s.status.rank: s for s in sights}, world or len(sights), timeout_s)


def test_waiting_for_different_things_is_a_deadlock_and_the_minority_is_named():
    verdict = judged(sight(0), sight(1, op="broadcast"), sight(2))
    assert verdict == Verdict(Kind.DEADLOCK, (1,), (0, 1, 2)) and verdict.kind.fatal


@pytest.mark.parametrize(
    "other", [{"count": 58}, {"nbytes": 8192}, {"group": (0, 1)}, {"detail": "b.weight"}, {"waits_for": "barrier"}]
)
def test_what_makes_operations_different(other):
    assert judged(sight(0), sight(1, **other)) == Verdict(Kind.DEADLOCK, (0, 1), (0, 1))


def test_other_places_in_the_program_do_not():
    """Ranks may meet in one operation from different modules, and bring different sizes to an all_to_all."""
    assert judged(sight(0), sight(1, module="blocks.4", phase="step", part="irecv")).kind is Kind.STALLED
    uneven = [sight(r, op="all_to_all_single", nbytes=100 * r) for r in range(2)]
    assert judged(*uneven).kind is Kind.STALLED and not Kind.STALLED.fatal


def test_two_receives_never_match():
    assert judged(sight(0, op="recv"), sight(1, op="recv")).kind is Kind.DEADLOCK


def test_a_deadlock_needs_time_and_stillness_on_every_rank():
    assert judged(sight(0), sight(1, count=58, unmoved=1.9)).kind is Kind.NOTHING
    assert judged(sight(0), sight(1, count=58, waited_s=3.9)).kind is Kind.NOTHING
    assert judged(sight(0), sight(1, count=58, unmoved=2.0, waited_s=4.0)).kind is Kind.DEADLOCK


def test_where_bytes_cannot_be_seen_stillness_takes_longer():
    assert judged(sight(0), sight(1, count=58, sure=False)).kind is Kind.NOTHING
    assert judged(sight(0, unmoved=T), sight(1, count=58, sure=False, unmoved=T)).kind is Kind.DEADLOCK


def test_a_rank_that_computes_makes_the_others_wait_for_ever():
    for waited in (6.0, 1e6):
        verdict = judged(sight(0, waited_s=waited, unmoved=waited), sight(1, State.COMPUTING, unmoved=waited))
        assert verdict == Verdict(Kind.SLOW, (1,), (0,)) and not verdict.kind.fatal


def test_silence_is_no_proof():
    assert judged(sight(0), sight(1, silent=1e6, count=58)) == Verdict(Kind.SILENT, (1,), (0, 1))
    assert judged(sight(0), world=2) == Verdict(Kind.SILENT, (1,), (0,))
    assert not Kind.SILENT.fatal
    assert judged(sight(0), sight(1, silent=4.9, count=58)).kind is Kind.DEADLOCK
    stopped = judged(sight(0), sight(1, State.STOPPED, silent=1e6))
    assert stopped == Verdict(Kind.SLOW, (1,), (0,))


@pytest.mark.parametrize("state", [State.RAISED, State.FINISHED, State.GONE, State.LEAVING])
def test_a_lost_peer_is_fatal_for_those_that_wait_for_it(state):
    assert judged(sight(0), sight(1, state), sight(2)) == Verdict(Kind.LOST_PEER, (1,), (0, 2))
    assert judged(sight(0), sight(1, state), sight(2, State.COMPUTING)).kind is Kind.LOST_PEER
    assert judged(sight(0, unmoved=0.9), sight(1, state)).kind is not Kind.LOST_PEER  # bytes may be under way
    elsewhere = [sight(0, group=(0, 2)), sight(1, state), sight(2, group=(0, 2))]
    assert judged(*elsewhere).kind is Kind.STALLED
    assert judged(sight(0, State.COMPUTING), sight(1, state)).kind is Kind.NOTHING


def test_a_lost_peer_is_told_once_all_had_time_to_speak():
    lost = sight(1, State.RAISED)
    assert judged(sight(0), lost, sight(2, State.COMPUTING, fresh=False, silent=2.9)).kind is Kind.SLOW
    assert judged(sight(0), lost, sight(2, State.COMPUTING, fresh=False, silent=3.0)).kind is Kind.LOST_PEER


def test_a_device_may_still_compute():
    assert judged(sight(0), sight(1, count=58, on_device=True)).kind is Kind.STALLED
    lost = sight(1, State.RAISED)
    assert judged(sight(0, on_device=True, unmoved=9.9), lost).kind is not Kind.LOST_PEER
    assert judged(sight(0, on_device=True, unmoved=T), lost).kind is Kind.LOST_PEER


def test_a_device_mark_never_fails_the_training():
    class Event:
        recorded = 0

        def record(self):
            self.recorded += 1
            if self.recorded == 2:
                raise RuntimeError("no device any more")

        def query(self):
            return self.recorded == 0

    mark = evidence.DeviceMark(Event())
    assert not mark.is_behind()
    mark.put()
    assert mark.is_behind()
    mark.put()
    mark.put()
    assert mark._event.recorded == 2 and not mark.is_behind()


def test_the_cause_is_blamed_not_its_consequences():
    sights = {
        0: sight(0, State.RAISED, consequence=True, error="RuntimeError: Connection closed"),
        1: sight(1, State.FINISHED),
        2: sight(2, State.RAISED, error="ValueError: boom"),
        3: sight(3, State.LEAVING),
    }
    assert blame(sights).ranks == (2,)
    del sights[2]
    assert blame(sights).ranks == (1,)
    sights[1] = sight(1, State.STOPPED)
    assert blame(sights).ranks == (1,)
    del sights[1], sights[3]
    assert blame(sights).ranks == (0,)


def test_report_of_a_deadlock():
    sights = {
        0: sight(0),
        1: sight(1, op="broadcast", nbytes=3_000_000, step=12, detail="bucket 3"),
        2: sight(2, step=13),
    }
    text = report(judge(sights, 3, T), sights, 3, T).splitlines()
    assert text[0] == "hang doctor: deadlock: all ranks wait, and rank 1 for something else than the others"
    assert text[1].split() == ["rank", "state", "step", "phase", "last", "collective", "module", "parameter"]
    assert text[2].split("  ")[0] == "0" and "waiting 6.0 s in all_gather" in text[2]
    assert "#57 all_gather 4.1 kB" in text[2] and "blocks.3.weight" in text[2]
    assert "waiting 6.0 s in broadcast (bucket 3)  <--" in text[3] and "#57 broadcast 3.0 MB" in text[3]
    assert text[5] == "last common step: 12"
    assert "different steps" in text[6]


def test_hints():
    alone = {0: sight(0), 1: sight(1, op="gather", phase="save_checkpoint"), 2: sight(2)}
    assert "rank 1 gathers alone" in report(judge(alone, 3, T), alone, 3, T)
    order = {0: sight(0), 1: sight(1, nbytes=1, module="blocks.4")}
    assert "set_z3_leaf_modules" in report(judge(order, 2, T), order, 2, T)
    ended = {0: sight(0), 1: sight(1, State.FINISHED), 2: sight(2, State.FINISHED)}
    text = report(judge(ended, 3, T), ended, 3, T)
    assert "ranks 1, 2 have finished; rank 0 waits for them" in text and "drop_last" in text
    failed = {0: sight(0), 1: sight(1, State.RAISED, error="ValueError: boom")}
    text = report(judge(failed, 2, T), failed, 2, T)
    assert "rank 1 raised ValueError: boom; rank 0 waits for it" in text and "traceback of rank 1" in text


def test_report_of_what_is_unknown():
    sights = {0: sight(0), 1: Sight(Status(1, State.GONE))}
    text = report(judge(sights, 3, T), sights, 3, T)
    rows = text.splitlines()[2:5]
    assert "gone (its process has ended without a word)" in rows[1] and "unknown" in rows[1]
    assert "no word" in rows[2]
    assert "last common step: at most 12" in text


def test_a_warning_ends_nothing_and_says_so():
    sights = {0: sight(0), 1: sight(1, State.COMPUTING)}
    text = report(judge(sights, 2, T), sights, 2, T)
    assert "rank 0 waits for rank 1, busy with something else" in text
    assert "Nothing is ended" in text and "DS_HANG_TIMEOUT_S (now 10 s" in text and "hint" not in text


def test_words_survive_the_store():
    status = sight(3, group=(1, 3), error='Err: "x"\n', host="h", pid=7).status
    assert Status.from_json(status.to_json()) == status
    assert Status.from_json(status.to_json().encode()).state is State.WAITING


# -- the record --------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    fresh = record.Now()
    monkeypatch.setattr(record, "now", fresh)
    fresh.on = True
    return fresh


def test_marks_cost_nothing_and_do_nothing_without_a_doctor():
    assert not doctor.now.on
    with doctor.waiting("x"), doctor.collective("y", 3):
        assert not doctor.now.waits and doctor.now.count == 0


def test_marks(watched):
    doctor.at(step=3, phase="forward")
    doctor.at(module="a.b")
    assert (watched.step, watched.phase, watched.module, watched.parameter) == (3, "forward", "a.b", "")
    with doctor.collective("all_gather", 12) as outer:
        with doctor.collective("isend", 4):  # a part of it
            assert [wait.op for wait in watched.waits] == ["all_gather", "isend"]
        assert (watched.op, watched.nbytes, watched.count, watched.moves) == ("all_gather", 12, 1, 1)
    assert not watched.waits and watched.moves == 2 and outer.since_s > 0
    with doctor.waiting("all_gather", "blocks.3"):
        assert watched.count == 1 and watched.waits[0].detail == "blocks.3"


def test_a_failed_wait_is_no_move_and_is_told(watched):
    seen: list[BaseException] = []
    watched.on_failure = seen.append
    with pytest.raises(RuntimeError), doctor.waiting("all_gather"):
        raise RuntimeError("Connection closed")
    assert [str(error) for error in seen] == ["Connection closed"] and watched.moves == 0 and not watched.waits


def test_marks_of_two_threads_do_not_mix(watched):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with doctor.waiting("other"):
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with doctor.waiting("own"):
        thread.start()
        inside.wait(5)
    assert [wait.op for wait in watched.waits] == ["other"]
    leave.set()
    thread.join()
    assert not watched.waits


# -- evidence ----------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_process_is_gone_when_it_ended_even_before_it_is_waited_for():
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    birth = evidence.birth_of(child.pid)
    assert not evidence.is_gone(child.pid, birth)
    assert evidence.is_gone(child.pid, birth - 1)  # the id was given to another process
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert evidence.is_gone(child.pid, birth)
    child.wait()
    assert evidence.is_gone(child.pid, birth)
    child.stdin.close()


def test_the_stack_and_place_of_another_thread():
    go, stop = threading.Event(), threading.Event()

    def work():
        go.wait(5)
        stop.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    first = evidence.position_of(thread.ident)
    assert "go.wait(5)" in evidence.stack_of(thread.ident) and evidence.torch_operation(thread.ident) == ""
    assert evidence.position_of(thread.ident) == first
    go.set()
    while "stop.wait(5)" not in evidence.stack_of(thread.ident):
        pass
    assert evidence.position_of(thread.ident) != first
    stop.set()
    thread.join()
    assert "has ended" in evidence.stack_of(thread.ident)


@linux
def test_a_page_outlives_its_writer():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        page = make_page()
        page.write(7, 4096, 2, "all_gather", "forward", "a.b", "a.b.weight" + "x" * 10_000)
        os.write(writing, f"{page.descriptor}\n".encode())
        os.read(0, 0)
        threading.Event().wait(30)
        os._exit(0)
    page = open_page(child, int(os.read(reading, 100)))
    os.kill(child, 9)
    os.waitpid(child, 0)
    said = page.read()
    assert said["parameter"].startswith("a.b.weightxxx") and len(said["parameter"]) < 5000
    assert {k: v for k, v in said.items() if k != "parameter"} == {
        "count": 7,
        "nbytes": 4096,
        "step": 2,
        "op": "all_gather",
        "phase": "forward",
        "module": "a.b",
    }
    assert page.read_word() == ""
    page.close()
    os.close(reading)
    os.close(writing)
    assert open_page(child, 5) is None
    empty = make_page()
    assert empty.read() == {}
    for word in ("the last word", "shorter"):
        empty.write_word(word)
        assert empty.read_word() == word
    empty.write_word("too long for it" * 1000)
    empty.write_word("")
    assert empty.read_word() == ""
    empty.close()
