"""However a model is trained, the weights become those of Algorithm 1; or a clear error says what to do."""

from importlib.util import find_spec

import matrix
import pytest
from matrix import Cell
from models import STREAMS

QUICK = [
    ("cell", *Cell(*cell))
    for cell in (
        ("one process", "copy", "reentrant"),
        ("DDP", "copy", "non-reentrant"),
        ("DDP", "copy", "off", "off", "bf16"),
        ("DDP", "lora"),
        ("DDP", "lora", "non-reentrant", "off", "bf16"),
        ("DDP", "lora", "reentrant"),
        ("DDP", "module", "reentrant"),
        ("FSDP2 root", "copy", "non-reentrant"),
        ("FSDP2 blocks", "copy"),
        ("FSDP2 blocks", "lora"),
        ("FSDP2 blocks", "copy", "off", "off", "fp32", "blocks"),
        ("FSDP2 without root", "copy"),
        ("FSDP1", "copy"),
    )
] + [("draws", *Cell("DDP")), ("unequal", "auto")]
APART = [("apart", name) for name in ("offloaded", "beside", "layouts", "tables", "fails", "waits")]
LAUNCHERS = [*matrix.LAUNCHERS, "FSDP1", "FSDP2 without root"]


def named(jobs):
    return pytest.mark.parametrize("job", [_param(*job) for job in jobs])


def _param(*job):
    """A job, left out where torch cannot shard; a teacher's shards are FSDP2's too."""
    shards = any("FSDP2" in str(word) or word in ("blocks", "unequal", "apart") for word in job)
    return pytest.param(
        job, id=" ".join(map(str, job)), marks=STREAMS if shards and job != ("apart", "offloaded") else ()
    )


def accept(found):
    """Equal, or refused by the package with a way out."""
    assert found["what"] in ("equal", "refused"), f"{found['what']}: {found.get('apart')} {found.get('why')}"
    if found["what"] == "refused":
        assert any(word in found["why"] for word in ("Use ", "Pass ", "Call "))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return dict(matrix.run(QUICK + APART, tmp_path_factory.mktemp("quick")))


@named(QUICK)
def test_two_processes_end_at_the_weights_of_algorithm_1_or_say_why_not(quick, job):
    accept(quick[job])
    refused = job[0] == "cell" and Cell(*job[1:]).refused
    assert quick[job]["what"] == ("refused" if refused else "equal")


@named(APART)
def test_processes_that_are_given_different_things_never_wait_for_each_other_for_ever(quick, job):
    assert quick[job]["what"] == "equal", quick[job].get("why")


def needs(launcher):
    if launcher.startswith("ZeRO") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if launcher.startswith("FSDP2") and STREAMS.args[0]:
        pytest.skip(STREAMS.kwargs["reason"])


ALL = (*matrix.MAIN, *matrix.FURTHER)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "compiled"), sorted({(cell.launcher, cell.compile) for cell in ALL}))
def test_no_cell_of_the_matrix_is_silently_wrong(launcher, compiled, tmp_path):
    needs(launcher)
    jobs = [("cell", *cell) for cell in ALL if (cell.launcher, cell.compile) == (launcher, compiled)]
    ends = set()
    for job, found in matrix.run(jobs, tmp_path):
        print(" ".join(job), found)
        accept(found)
        ends.add(found["what"])
        if compiled == "off":
            assert found["what"] == ("refused" if Cell(*job[1:]).refused else "equal"), job
    assert "equal" in ends


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_every_launcher_draws_apart_and_goes_on_from_a_saved_state(launcher, tmp_path):
    needs(launcher)
    ((_, found),) = matrix.run([("draws", *Cell(launcher))], tmp_path)
    assert found["what"] == "equal", found


@STREAMS
@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, None])
def test_unequal_batches_and_a_sharded_teacher_are_right_or_refused(micro_batch, tmp_path):
    ((_, found),) = matrix.run([("unequal", micro_batch)], tmp_path)
    accept(found)
