"""Two processes over gloo on the CPU: the same training as one, whatever the processes have to do."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsdp_worker import batch, make_model
from safetensors.torch import load_file
from test_trainer import assert_same, assert_same_lines, steps, weights
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm import HRMGemmaForCausalLM
from hrm.saving import checkpoints
from hrm.settings import UsageError, load_training_settings
from hrm.sharding import check_sharding
from hrm.training_state import check_training

TESTS = Path(__file__).parent
SERVERS: dict[int, subprocess.Popen] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_backbone(folder / "backbone")
    rows = [{"prompt": "?" * (1 + n % 7), "answer": "yes " * (1 + n % 3)} for n in range(40)]
    rows += [{"prompt": f"held out {n}", "answer": "no"} for n in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(
    place: Path, name: str, processes: int, *words: str, program: tuple[str, ...] = ("-m", "hrm"),
    start: Callable[..., None] | None = None,
) -> Path:  # fmt: skip
    """Runs `hrm train` with so many processes, started by `start` (`launch`); returns the run folder."""
    own = [f"hrm.backbone={place / 'backbone'}", *TINY_CORE, f"data.path={place / 'rows.jsonl'}", "data.held_out=1"]
    own += ["train.batch_size=4", "train.save_every=2", "eval.max_new_tokens=1"]
    own += ["train.core_lr=0.01", "train.adapter_lr=0.01", f"run.folder={place / name}"]
    words = words if words[0].startswith("run.resume") else (*own, *words)
    (start or launch)(*program, "train", *words, processes=processes, cwd=place)
    (folder,) = (place / name).iterdir()
    return folder


def environment() -> dict[str, str]:
    paths = TESTS.parents[1], TESTS, TESTS.parent  # the package before the folder of its tests, which is named alike
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def server_of(rank: int) -> subprocess.Popen:
    """What the processes of this rank are forked off."""
    if rank not in SERVERS:
        command, pipe = [sys.executable, str(TESTS / "forked.py")], subprocess.PIPE
        SERVERS[rank] = subprocess.Popen(
            command, env=environment(), text=True, start_new_session=True, stdin=pipe, stdout=pipe
        )
    return SERVERS[rank]


def close_servers() -> None:
    while SERVERS:
        _, server = SERVERS.popitem()
        os.killpg(server.pid, signal.SIGKILL)  # and what it has forked
        server.communicate()


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    yield
    close_servers()


def launch(*command: str, processes: int, cwd: Path | None = None) -> None:
    """Runs `command` in so many processes, with what torchrun sets in their environments."""
    port, streams, statuses = free_port(), [], list[str]()
    with tempfile.TemporaryDirectory() as said:
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job = {"command": command, "environment": {name: str(value) for name, value in own.items()}}
            job |= {"folder": str(cwd or TESTS), "said": f"{said}/{rank}"}
            server = server_of(rank)
            print(json.dumps(job), file=server.stdin, flush=True)
            streams.append(server.stdout)
        while streams and set(statuses) <= {"0\n"}:
            ready = select.select(streams, [], [], 240)[0]
            statuses += [stream.readline() for stream in ready] or ["none within 240 seconds"]
            streams = [stream for stream in streams if stream not in ready]
        if set(statuses) != {"0\n"}:
            close_servers()  # the others wait for the one that failed
            told = [path.read_text()[-3000:] for path in sorted(Path(said).iterdir())]
            raise AssertionError("\n".join((str(statuses), *told)))


def torchrun(*command: str, processes: int, cwd: Path | None = None) -> None:
    """As `launch`, with torchrun itself, whose processes import everything first."""
    words = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    words += ["--nproc-per-node", str(processes), *command]
    done = subprocess.run(words, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    "words",
    [
        ("hrm.segments=2", "train.micro_batch=1"),
        ("hrm.act=true", "hrm.max_segments=4", "hrm.min_segments=1"),
        ("hrm.segments=4", "hrm.stop_residual=0.85"),
    ],
    ids=["segments", "act", "uneven"],
)
def test_two_processes_train_as_one(place: Path, words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    one, two = (train(place, f"{name}-{n}", n, "train.steps=6", *words) for n in (1, 2))
    assert_same(weights(one), weights(two), tolerance=2e-4)
    assert_same_lines(steps(one), steps(two))  # losses of segments, Q values, residuals: of all processes' tokens
    if name == "uneven":
        assert any(line["segments"] % 1 for line in steps(two))  # rows halt after different numbers of segments
    for a, b in zip(steps(one), steps(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_gradients_are_summed_once_a_step_whatever_the_segments(place: Path) -> None:
    words = ["hrm.act=true", "hrm.max_segments=4", "hrm.min_segments=1", "hrm.exploration=0.5", "train.steps=8"]
    train(place, "sums", 2, *words, program=(str(TESTS / "count_sums.py"),), start=torchrun)
    counted = [json.loads((place / f"sums-{rank}.json").read_text()) for rank in (0, 1)]
    assert [step["sums"] for steps_of_one in counted for step in steps_of_one] == [1] * 16
    assert any(a["segments"] != b["segments"] for a, b in zip(*counted, strict=True))
    assert all(a["w_x"] == b["w_x"] for a, b in zip(*counted, strict=True))  # all have the first one's weights


def test_a_run_goes_on_with_another_number_of_processes(place: Path) -> None:
    words = "train.steps=6", "hrm.segments=2", "train.log_every=3"
    straight = train(place, "straight", 1, *words)
    cut = train(place, "cut", 2, *words)
    newest = checkpoints(cut)[-1]
    assert sorted(path.name for path in newest.glob("rank-*.json")) == ["rank-0.json", "rank-1.json"]
    for path in newest.iterdir():  # as if it had been killed after step 4
        path.unlink()
    newest.rmdir()
    train(place, "cut", 1, f"run.resume={cut}")
    assert_same(weights(straight), weights(cut), tolerance=2e-4)
    assert [line["step"] for line in steps(cut)] == [3, 6]
    assert_same_lines(steps(straight), steps(cut))  # the last one is of steps of two processes and of one


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("optimizer.safetensors", "step-00000004 cannot be written: "),
        ("rank-1.safetensors", "process 1: {run}/checkpoints/step-00000004 cannot be written: "),
        ("new_place", "step-00000004 cannot be written: "),
        ("save_pretrained", "{run}/checkpoint cannot be written: "),
    ],
)
def test_a_full_disk_of_one_process_ends_all_with_the_same_message(
    place: Path, tmp_path: Path, where: str, message: str
) -> None:
    program = str(TESTS / "full_disk.py"), str(tmp_path), where
    folder = train(place, f"full-{where}", 2, "train.steps=5", "hrm.segments=2", program=program)
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))  # a process that is killed writes none
    assert one == other and one.startswith("1 hrm: ")
    assert message.format(run=folder) in one and "No space left on device" in one
    assert one.endswith(f"; with that mended, go on with run.resume={folder}\n")
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == (["step-00000004", "step-00000005"] if where == "save_pretrained" else ["step-00000002"])
    check_training(checkpoints(folder)[-1])


@pytest.mark.parametrize(
    "words",
    [
        ("hrm.act=true", "hrm.max_segments=3", "hrm.exploration=0.5", "hrm.q_target=replay", "lora.dropout=0.2"),
        ("hrm.segments=2", "train.update_every=segment"),
    ],
    ids=["replay", "segment"],
)
def test_a_step_for_which_one_process_lacks_memory_is_done_again_by_all(
    place: Path, tmp_path: Path, words: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Bit for bit what follows where one goes on from the step before with the smaller micro-batch."""
    name, own = request.node.callspec.id, ["train.steps=4", "train.batch_size=8", "train.micro_batch=2", *words]
    program = str(TESTS / "little_memory.py"), str(tmp_path), "1", "1"
    short = train(place, f"short-{name}", 2, *own, program=program)
    assert [line["micro_batch"] for line in steps(short)] == [2, 2, 1, 1]
    message = "out of memory on process 1 with 2 rows at a time; going on with 1"
    assert [(tmp_path / f"{rank}.txt").read_text().count(message) for rank in (0, 1)] == [1, 0]  # told by the first
    again = place / f"again-{name}" / short.name
    shutil.copytree(short, again)
    shutil.rmtree(checkpoints(again)[-1])
    config = (again / "config.yaml").read_text()
    (again / "config.yaml").write_text(config.replace("micro_batch: 2\n", "micro_batch: 1\n"))
    train(place, again.parent.name, 2, f"run.resume={again}")
    assert_same(weights(again), weights(short))
    assert steps(again) == steps(short)


def test_one_process_without_memory_for_a_row_ends_all_with_the_same_message(place: Path, tmp_path: Path) -> None:
    program = str(TESTS / "little_memory.py"), str(tmp_path), "0", "9"
    folder = train(place, "none", 2, "train.steps=4", "train.batch_size=8", "train.micro_batch=2", program=program)
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))  # a process that is killed writes none
    assert one.startswith("1 ") and other.startswith("1 ")
    message = (
        "hrm: out of memory on process 1 at step 3 with one row at a time (CUDA out of memory. Tried to allocate 2 GiB)"
        f"; last good checkpoint: {folder}/checkpoints/step-00000002, of step 2\n"
    )
    assert one.endswith(message) and other.endswith(message)


@pytest.fixture(scope="module", params=["gemma3_text", "qwen3"])  # embeddings tied to the head, and not
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind of backbone, and what two processes have left of it under torch's FSDP2."""
    folder = tmp_path_factory.mktemp(f"sharded-{request.param}")
    launch(str(TESTS / "fsdp_worker.py"), str(folder), request.param, processes=2)
    return request.param, folder


def test_fsdp_gives_the_gradients_of_one_process_and_keeps_its_checkpoint(sharded: tuple[str, Path]) -> None:
    kind, folder = sharded
    model = make_model(kind)
    ids, labels = batch()
    model(ids, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = load_file(folder / "gradients.safetensors")
    assert_same(expected, found, tolerance=1e-4)
    assert torch.linalg.vector_norm(found["hrm.w_c"]) > 0


def test_a_model_that_fsdp_has_cut_up_is_saved_whole_and_generates(sharded: tuple[str, Path]) -> None:
    kind, folder = sharded
    whole = make_model(kind)
    whole.save_pretrained(folder / "whole")
    assert sorted(p.name for p in (folder / "model").iterdir()) == sorted(p.name for p in (folder / "whole").iterdir())
    assert (folder / "model" / "config.json").read_text() == (folder / "whole" / "config.json").read_text()
    assert_same(*(load_file(folder / name / "model.safetensors") for name in ("whole", "model")), tolerance=0)
    loaded = HRMGemmaForCausalLM.from_pretrained(folder / "model").eval()
    ids, _ = batch()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole.eval()(ids).logits)
    for rank, tokens in enumerate((2, 7)):  # one goes on after the other is done
        expected = whole.generate(ids[rank::2], attention_mask=torch.ones_like(ids[rank::2]), max_new_tokens=tokens)
        assert torch.equal(load_file(folder / f"tokens-{rank}.safetensors")["tokens"], expected)


FSDP = (str(TESTS / "fsdp_hrm.py"),)


def test_hrm_train_under_fsdp_is_training_in_one_process(place: Path) -> None:
    words = "train.steps=4", "hrm.segments=2", "train.micro_batch=1", "train.depth=[[0.5,1,1]]"
    one = train(place, "fsdp-1", 1, *words)
    two = train(place, "fsdp-2", 2, *words, program=FSDP)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=1e-4)
    assert_same(weights(one), weights(two), tolerance=5e-4)
    models = [load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, two)]
    assert_same(*models, tolerance=5e-4)
    configs = [(folder / "checkpoint" / "config.json").read_text() for folder in (one, two)]
    assert configs[0] == configs[1]  # of the full depth
    assert (one / "answers-after.jsonl").read_text() == (two / "answers-after.jsonl").read_text()


def test_a_sharded_run_goes_on_whole_and_the_other_way_round(place: Path) -> None:
    straight = train(place, "whole", 1, "train.steps=4", "hrm.act=true", "hrm.max_segments=2")
    for name, before, after in (("shards-1", FSDP, ("-m", "hrm")), ("shards-2", ("-m", "hrm"), FSDP)):
        cut = train(place, name, 2, "train.steps=4", "hrm.act=true", "hrm.max_segments=2", program=before)
        shutil.rmtree(checkpoints(cut)[-1])  # as if it had been killed after step 2
        train(place, name, 2, f"run.resume={cut}", program=after)
        assert_same(weights(straight), weights(cut), tolerance=1e-3)
        assert [line["step"] for line in steps(cut)] == [1, 2, 3, 4]


def test_a_backbone_in_bfloat16_is_sharded_beside_a_core_in_float32(place: Path) -> None:
    whole, cut = (train(place, name, 2, "train.steps=2", "hrm.segments=2", program=(*FSDP, name))
                  for name in ("bf16-whole", "bf16"))  # fmt: skip
    for a, b in zip(steps(whole), steps(cut), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    kinds = [{name: tensor.dtype for name, tensor in load_file(folder / "checkpoint" / "model.safetensors").items()}
             for folder in (whole, cut)]  # fmt: skip
    assert kinds[0] == kinds[1]
    assert {kinds[1]["hrm.w_l"], kinds[1]["backbone.model.norm.weight"]} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("variable", "value", "words", "message"),
    [
        ("FSDP_VERSION", "1", [], "accelerate's fsdp_version is 1; it should be 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", [], "accelerate's fsdp_cpu_ram_efficient_loading is true"),
        ("FSDP_OFFLOAD_PARAMS", "true", [], "accelerate's fsdp_offload_params is true; it should be false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", [], "train.gradient_checkpointing=true does it"),
        ("FSDP_VERSION", "2", ["hrm.quantize=nf4"], "hrm.quantize is 'nf4'; it should be null under FSDP"),
    ],
)
def test_what_does_not_go_with_fsdp_is_refused_by_name(
    variable: str, value: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_training_settings(words)
    monkeypatch.setenv(variable, value)
    check_sharding(settings)  # accelerate has no FSDP on
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=message):
        check_sharding(settings)
