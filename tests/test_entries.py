"""The entries as a user starts them: whole small runs, and every mistake in one line."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import REPOSITORY, USER_ENVIRONMENT, run_ranks
from tiny_entries import arguments, losses, overflowing_tower, read_metrics, start
from transformers import AutoModelForImageTextToText, AutoProcessor

from dehvf_ds.config import UserError
from dehvf_ds.data.building.__main__ import main as build_shards
from dehvf_ds.data.index import ShardIndex


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")
def test_train_evaluate_generate_merge_load(world: Path) -> None:
    run = world / "runs" / "two"
    run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "two"), 2)
    run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "one", "--data.num_workers", "0"), 1)
    # The same rows on one rank without workers and on two ranks with one each: the order is the same.
    assert losses(world, "two") == pytest.approx(losses(world, "one"), rel=1e-5)
    files = {"config.yaml", "metrics.jsonl", "tensorboard", "adapter", "checkpoints"}
    assert {path.name for path in run.iterdir()} - {".lock"} == files
    assert json.loads((run / "adapter/manifest.json").read_text())["step"] == 4

    data = ["--data", str(world / "test"), "--batch_size", "3", "--max_new_tokens", "8", "--loss", "true"]
    data += ["--references", str(world / "scenes/annotations/captions_test.json")]
    run_ranks(REPOSITORY / "dehvf_ds/eval.py", ["--model", str(run), *data], 2)
    metrics = read_metrics(run / "eval/caption-test")
    assert metrics["num_samples"] == 4
    assert metrics["comparable"] is True
    assert metrics["protocol"]["references"]["sha256"]
    assert metrics["seeds"] == {"training": 0, "decoding": None}
    assert metrics["decoding"]["num_beams"] == 1
    assert 4 < metrics["loss"] < 7
    assert (run / "eval/caption-test/examples.png").stat().st_size > 1000

    merged = world / "merged"
    # In fp32, as the run: a model of random weights says another thing at every rounding.
    fp32 = ["--dtype", "fp32"]
    result = start("tools/merge_adapters.py", ["--checkpoint", str(run), "--output", str(merged), *fp32])
    assert result.returncode == 0, result.stderr
    picture = sorted((world / "scenes/images/test").iterdir())[0]
    answers = [
        start("dehvf_ds/generate.py", ["--model", str(d), "--image", str(picture), "--max_new_tokens", "8"])
        for d in (run, merged)
    ]
    assert [a.returncode for a in answers] == [0, 0], answers[1].stderr
    assert answers[0].stdout.splitlines()[-1] == answers[1].stdout.splitlines()[-1]

    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=[model.config.prompt])
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert " ".join(text.split()) == answers[1].stdout.splitlines()[-1]


@pytest.mark.slow
def test_deepspeed_by_its_path_needs_nothing_of_the_shell(world: Path, tmp_path: Path) -> None:
    """No environment activated, no compiler, no variable: what is typed as ``.venv/bin/deepspeed ...``."""
    train = [str(REPOSITORY / "dehvf_ds/train.py"), *arguments(world, "launched", "--train.steps", "1")]
    train += ["--train.warmup_steps", "0"]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--master_port={port}"]
    result = subprocess.run(
        [*launcher, "--num_accelerators=2", *train],
        env=USER_ENVIRONMENT | {"HOME": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(world, "launched")) == 1
    # On the console are the launcher's lines and the program's, none of libraries.
    assert result.stderr == ""
    printed = [line for line in result.stdout.splitlines() if not re.match(r"\[[\d-]+ [\d:,]+\] \[", line)]
    assert [line.split()[0] for line in printed] == [*[f"{world}/runs/launched:"] * 2, "step", "adapter:"]
    # Nothing was compiled.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_questions_with_and_without_pictures_train_and_are_scored_on_two_ranks(world: Path) -> None:
    more = ["--data.task", "scienceqa", "--data.train", str(world / "scienceqa"), "--data.max_tokens", "400"]
    run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "questions", *more), 2)
    found = losses(world, "questions")
    assert len(found) == 4
    assert all(0 < loss < 7 for loss in found)
    given = ["--task", "scienceqa", "--data", str(world / "scienceqa"), "--batch_size", "5", "--loss", "true"]
    given += ["--model", str(world / "runs/questions")]
    run_ranks(REPOSITORY / "dehvf_ds/eval.py", given, 2)
    read = read_metrics(world / "runs/questions/eval/scienceqa-scienceqa")
    assert read["protocol"]["form"] == "QCM-A"
    assert read["num_samples"] == read["num_problems"]["Avg"] == len(ShardIndex(world / "scienceqa"))
    assert 0 < read["num_problems"]["IMG"] < read["num_samples"]
    # Two ranks and one, generation and likelihood: the same rows; a likelihood has no failures.
    likeliest = start("dehvf_ds/eval.py", [*given, "--reading", "likelihood", "--split", "likeliest"])
    assert likeliest.returncode == 0, likeliest.stderr
    chosen = read_metrics(world / "runs/questions/eval/scienceqa-likeliest")
    assert chosen["num_parse_failures"] == 0
    assert chosen["accuracy"]["Avg"] > 0
    assert chosen["loss"] == pytest.approx(read["loss"], rel=1e-4)
    assert chosen["markdown"] in likeliest.stdout
    assert not list((world / "runs/questions/eval").rglob(".answers-*"))


@pytest.mark.slow
def test_conversations_train_on_two_ranks_from_a_pipe(world: Path) -> None:
    # Of one turn and of two, with a picture and without.
    pictures = sorted((world / "scenes/images/train").iterdir())[:8]
    chats = []
    for i, picture in enumerate(pictures):
        question = "<image>\nWhat is it?" if i % 3 else "What is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Scene {i}."}]
        if i % 2:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
        chats.append({"id": str(i), "conversations": turns} | ({"image": picture.name} if i % 3 else {}))
    (world / "chats.json").write_text(json.dumps(chats))
    given = ["--json", str(world / "chats.json"), "--images", str(world / "scenes/images/train")]
    assert build_shards(["llava", *given, "--output", str(world / "chats")]) == 0
    chats = world / "chats"
    elsewhere = world / "elsewhere"
    elsewhere.mkdir()
    for shard in chats.glob("*.tar"):
        shard.rename(elsewhere / shard.name)
    more = ["--data.task", "chat", "--data.train", str(chats), "--data.max_tokens", "100"]
    more += ["--data.location", f"pipe:cat {elsewhere}/{{}}", "--data.cache_dir", str(world / "cache")]
    run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "chats", *more), 2)
    found = losses(world, "chats")
    assert len(found) == 4
    assert all(0 < loss < 7 for loss in found)


@pytest.mark.slow
def test_damaged_samples_stop_the_run_or_are_substituted_and_counted(world: Path) -> None:
    shards = shutil.copytree(world / "train", world / "damaged")
    index = ShardIndex(shards)
    for row in range(0, len(index), 3):
        name, offset, size = index.locate(row)
        data = bytearray((shards / name).read_bytes())
        data[offset + size // 2] ^= 1
        (shards / name).write_bytes(bytes(data))
    data = ["--data.train", str(shards), "--data.num_workers", "1"]
    result = start("dehvf_ds/train.py", arguments(world, "raise", *data))
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "not the bytes that the index was made of" in line
    assert "Traceback" not in result.stderr

    replacing = [*data, "--data.on_bad", "substitute", "--data.max_bad_share"]
    outputs = run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "replace", *replacing, "0.5"), 2)
    lines = (world / "runs/replace/metrics.jsonl").read_text().splitlines()
    substituted = json.loads(lines[-1])["substituted"]
    assert len(lines) == 4
    assert 4 < substituted < 20
    assert f"substituted {substituted} damaged samples; by shard: coco-00000" in outputs[0]
    assert "".join(outputs).count("substituted a damaged sample: ") == substituted

    result = start("dehvf_ds/train.py", arguments(world, "too-bad", *replacing, "0.001"))
    assert result.returncode == 1
    assert "samples are damaged, more than data.max_bad_share 0.001 of them; by shard: coco-" in result.stderr
    assert (world / "runs/too-bad/adapter/manifest.json").is_file()


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run_and_keep_the_artifact(world: Path) -> None:
    tower = overflowing_tower(world)
    more = ["--train.steps", "9", "--train.max_bad_steps", "3", "--model.vision_tower", str(tower)]
    result = start("dehvf_ds/train.py", arguments(world, "nan", *more))
    assert result.returncode == 1
    assert "3 steps in a row had a loss or gradient that is not finite; stopped at step 3" in result.stderr
    assert losses(world, "nan") == [None, None, None]
    assert (world / "runs/nan/adapter/manifest.json").is_file()


@pytest.mark.parametrize(
    ("entry", "more", "message"),
    [
        ("train", ["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file in "),
        ("train", ["--train.lrr", "1"], "lrr"),
        ("train", ["--deepspeed", "/nowhere/ds.json"], "--deepspeed /nowhere/ds.json: no such file"),
        ("train", ["--data.train", "my/shards"], "my/shards: no such directory in {cwd}"),
        ("train", ["--model.language_model", "/nowhere/llm"], "/nowhere/llm"),
        ("train", ["--model.vision_tower", "my/own/tower"], "my/own/tower: no such directory in {cwd}"),
        ("train", ["--model.language_model", "{world}/gpt2"], "GPT2LMHeadModel is not a decoder whose"),
        ("train", ["--model.lora.targets", "[fc1]"], "no linear map 'fc1'"),
        ("train", ["--train.micro_batch_size", "3"], "global_batch_size 8 is not a multiple of"),
        ("train", ["--eval.every_steps", "2"], "needs rows to answer: set eval.data or data.val"),
        ("train", ["--eval.every_steps", "2", "--data.task", "chat"], "chat has no scores"),
        ("train", ["--eval.every_steps", "2", "--eval.data", "{world}/scienceqa"], "cannot score"),
        ("train", ["--model.num_feature_layers", "9"], "9 feature layers do not fit a tower with 4 blocks"),
        ("eval", ["--model", "/nowhere", "--data", "{world}/test"], "/nowhere: no such directory"),
        ("generate", ["--model", "{world}", "--image", "/nowhere.png"], "/nowhere.png"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    world: Path, alone, entry: str, more: list[str], message: str
) -> None:
    given = [text.format(world=world) for text in more]
    args = arguments(world, "bad", *given) if entry == "train" and "--config" not in given else given
    with pytest.raises(UserError, match=re.escape(message.replace("{cwd}", str(Path.cwd())))):
        importlib.import_module(f"dehvf_ds.{entry}").main(args)
    assert not (world / "runs" / "bad").exists()


@pytest.mark.slow
def test_a_mistake_is_one_line_and_code_2(world: Path) -> None:
    (world / "runs/used").mkdir(parents=True)
    (world / "runs/used/metrics.jsonl").write_text("")
    for entry, args, message in (
        ("train", arguments(world, "used"), "holds a run"),
        ("eval", ["--model", "/nowhere", "--data", str(world / "test")], "/nowhere: no such directory"),
    ):
        result = start(f"dehvf_ds/{entry}.py", args)
        assert result.returncode == 2, result.stderr
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert message in line
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_dry_run_walks_the_whole_road_and_writes_nothing(world: Path) -> None:
    # Neither what the JSON has DeepSpeed write, nor anything in the home directory.
    profiler = {"enabled": True, "profile_step": 1, "output_file": str(world / "profile.txt")}
    (world / "dry.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "flops_profiler": profiler})
    )
    (world / "home").mkdir()
    before = sorted(world.rglob("*"))
    more = ["--dry-run", "--data.val", str(world / "test"), "--model.feature_layers", "[2, 4]"]
    more += ["--deepspeed", str(world / "dry.json"), "--data.cache_dir", "~/cache"]
    result = start("dehvf_ds/train.py", arguments(world, "dry", *more), home=world / "home")
    assert result.returncode == 0, result.stderr
    assert "begins, for 4 steps" in result.stdout
    assert f"{world / 'test'}: first micro-batch 2 rows of up to" in result.stdout
    assert "the dry run passed; nothing was written" in result.stdout
    assert sorted(world.rglob("*")) == before
    # What only the step finds out.
    damaged = shutil.copytree(world / "train", world / "dry_damaged")
    shard = sorted(damaged.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[2000:-2000] = bytes(len(content) - 4000)
    shard.write_bytes(content)
    result = start("dehvf_ds/train.py", arguments(world, "dry", "--dry-run", "--data.train", str(damaged)))
    assert result.returncode == 2
    assert f"{damaged}: {shard.name}: sample 0" in result.stderr


NEEDLESS = (
    "deepspeed",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "tensorboard",
    "pycocoevalcap",
    "networkx",
)
NEEDLESS += (
    "torch.utils.tensorboard",
    "torch._inductor.lowering",
    "functorch.compile",
    "transformers.trainer",
)
FROM_A_STEP_ON = ("deepspeed", "tensorboard", "torch.utils.tensorboard")


@pytest.mark.slow
def test_a_start_loads_no_library_that_it_does_not_need(world: Path) -> None:
    """Every rank waits for imports, torch's compiler alone takes a second."""
    code = """
import json, sys
from dehvf_ds import doctor, eval, generate, plan, train
from dehvf_ds.data.building import __main__
import dehvf_ds.export.__main__, dehvf_ds.report.__main__
start = set(sys.modules)
assert train.main(sys.argv[1:]) == 0
print(json.dumps([sorted(start), sorted(sys.modules)]))
"""
    args = arguments(world, "imports", "--train.steps", "1")
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=USER_ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    start, step = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "dehvf_ds.train"} - set(start)
    assert not set(NEEDLESS) & set(start)
    assert set(FROM_A_STEP_ON) <= set(step)
    assert not (set(NEEDLESS) - set(FROM_A_STEP_ON)) & set(step)
