import os
import sys

import pytest

from demo.stages import Stage, StageError, describe_seconds, read_records, run_stages


def stage(name, code, **kwargs):
    return Stage(name=name, title=name.title(), command=(sys.executable, "-c", code), **kwargs)


def append(path, text):
    return f"open({str(path)!r}, 'a').write({text!r})"


def test_each_stage_runs_once(tmp_path):
    log = tmp_path / "log"
    stages = [stage("one", append(log, "1")), stage("two", append(log, "2"))]
    run_stages(stages, tmp_path)
    records = run_stages(stages, tmp_path)
    assert log.read_text() == "12"
    assert all(record.is_done for record in records.values())


def test_a_failed_stage_runs_again_and_the_one_before_does_not(tmp_path):
    log, fault = tmp_path / "log", tmp_path / "fault"
    fault.touch()
    code = f"{append(log, '2')}; import os, sys; sys.exit(3 * os.path.exists({str(fault)!r}))"
    stages = [stage("one", append(log, "1")), stage("two", code), stage("three", append(log, "3"))]
    with pytest.raises(StageError, match=r"Two: the command above ended with exit code 3"):
        run_stages(stages, tmp_path)
    before = read_records(tmp_path)
    assert before["one"].is_done
    assert not before["two"].is_done
    fault.unlink()
    after = run_stages(stages, tmp_path)
    assert log.read_text() == "1223"
    assert after["two"].seconds > before["two"].seconds  # of both runs


def test_an_interruption_is_recorded(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages([stage("one", "", prepare=interrupt)], tmp_path)
    assert not read_records(tmp_path)["one"].is_done


def test_ctrl_c_waits_for_what_a_launcher_leaves_behind(tmp_path):
    """The command ends at once; what it started goes on and saves something first."""
    saved = tmp_path / "saved"
    rank = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); print(flush=True); "
        f"signal.pause(); time.sleep(0.5); open({str(saved)!r}, 'w')"
    )
    launcher = (
        "import os, signal, subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE); "
        f"p.stdout.readline(); os.kill({os.getpid()}, signal.SIGINT); p.wait()"
    )
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage("one", launcher)], tmp_path)
    assert saved.exists()
    assert not read_records(tmp_path)["one"].is_done


def test_other_options_are_refused_before_anything_runs(tmp_path):
    log = tmp_path / "log"
    run_stages([stage("one", ""), stage("two", append(log, "2"))], tmp_path)
    with pytest.raises(StageError, match=r"was made with other options.*delete it"):
        run_stages([stage("zero", append(log, "0")), stage("two", "pass")], tmp_path)
    assert log.read_text() == "2"


def test_a_program_that_is_not_there_is_named(tmp_path):
    missing = Stage(name="one", title="One", command=("/nowhere/program",))
    with pytest.raises(StageError, match=r"/nowhere/program cannot be run"):
        run_stages([missing], tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.24, "3.2 s"), (59.4, "59.4 s"), (725.0, "12 min 05 s")]
)
def test_durations_read_well(seconds, text):
    assert describe_seconds(seconds) == text
