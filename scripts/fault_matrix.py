"""Tests a run that is killed, whose disk is full, whose files are damaged, or whose folder is hostile.

    python scripts/fault_matrix.py --kills 50 --write docs/faults.md

Runs the command on a very small language model, once without a fault and then once for each fault, and resumes with
`sparsefit fit --resume RUN`. The columns of the table:

- resumed: the run then finishes with weights bit-identical to those of the run without a fault, and undamaged files;
- reported: the command ended with a message, not with a traceback or in silence;
- lost: the run could not be resumed;
- silent: the command accepted what is wrong.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.callbacks import run_folder
from sparsefit.cli import fit, merge  # noqa: F401 (imported once, for all that are forked)
from sparsefit.cli import main as run_command
from sparsefit.data import TextFilesDataModule  # noqa: F401
from sparsefit.files import file_sum, write_sums
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_tokenizer
from sparsefit.recovery.run_files import WRITTEN_FOLDERS, damaged_files, newest_checkpoint, read_state

STEPS = 4
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards read the documentation of python aloud"
WORDS = TEXT.split(" ")
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkstemp")
NEEDS_SPACE = ("open", "os.mkdir", "tempfile.mkstemp")
TOLD = (1, 2)
KINDS = ("kills", "disk", "bits", "writers", "hostile", "nan")


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    gone_on: int = 0
    told: int = 0
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class Writes:
    """Counts what a process writes in a folder, as Python's audit hooks see it; acts from the n-th on."""

    def __init__(self, folder: Path, at: int, act: Callable[[str], None]) -> None:
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an event of the process."""
        if event not in WRITES or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.count += 1
        if self.count >= self.at:
            self.act(event)


def kill(event: str) -> None:
    """As `kill -9` and a power cut do."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(event: str) -> None:
    """Nothing more fits on the disk."""
    if event in NEEDS_SPACE:
        raise OSError(errno.ENOSPC, "No space left on device")


class Workplace:
    """A tiny model, its text, and the commands on it, each in a process of its own that is forked to start at once."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder, self.steps = folder, steps
        self.output = ""
        self._outputs: dict[int, int] = {}  # by process: a pipe, which no full disk and no limit of files reaches
        tokenizer = load_tokenizer("tiny-llama")
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for part in ("train", "test"):
            (folder / part).mkdir()
            for number in range(4):
                text = " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(200))
                (folder / part / f"{number}.txt").write_text(text + part)

    def recipe(self, run: Path) -> Path:
        """The file of the recipe of a run."""
        common = {"tokenizer": str(self.folder / "model"), "sequence_length": 16, "batch_size": 2, "shuffle_buffer": 5}
        sources = {f"{part}_source": str(self.folder / part) for part in ("train", "test")}
        adapter = {"r": 2, "dropout": 0.1, "form": "masked_lora", "target_modules": ["q_proj"]}
        saver = {"dirpath": str(run / "checkpoints"), "save_last": True, "enable_version_counter": False}
        saver |= {"every_n_train_steps": 2, "save_on_exception": True}
        settings = {
            "seed_everything": 3,
            "model": {
                "class_path": "sparsefit.modules.CausalLMModule",
                "init_args": {"model": str(self.folder / "model"), "learning_rate": 0.01, "adapter": adapter},
            },
            "data": {
                "class_path": "sparsefit.data.TextFilesDataModule",
                "init_args": common | sources | {"calibration_samples": 2, "calibration": "pack", "test_windows": 1},
            },
            "budget": {"gpu_hours": 10.0, "drive_learning_rate": False},
            "run": {"folder": str(run)},
            "trainer": {
                "accelerator": "cpu", "max_steps": self.steps, "log_every_n_steps": 1, "enable_progress_bar": False,
                "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}],
            },
        }  # fmt: skip
        file = self.folder / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def start(
        self,
        *arguments: Any,
        hook: Writes | None = None,
        file_size: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> int:
        """Start a command; `before` is called in its process first. Returns the id of that."""
        output, log = os.pipe()
        if (child := os.fork()) == 0:
            status = 70
            try:
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                os.chdir(self.folder)
                sys.argv = ["sparsefit", *map(str, arguments)]
                if file_size is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
                if hook is not None:
                    sys.addaudithook(hook)
                if before is not None:
                    before()
                status = run_command()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    if hook is not None:
                        hook.at = sys.maxsize
                        (self.folder / "count.txt").write_text(str(hook.count))
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)  # whatever happens: this process must never go on as the one it was forked from
        os.close(log)
        self._outputs[child] = output
        return child

    def ended(self, child: int) -> int:
        """The status of a command once it has ended: its exit status, or minus the signal that killed it."""
        with open(self._outputs.pop(child), errors="replace") as output:
            self.output = output.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def command(self, *arguments: Any, **settings: Any) -> int:
        """Run a command to its end."""
        return self.ended(self.start(*arguments, **settings))

    def told(self, status: int) -> bool:
        """Whether the last command ended with a sentence, and not with a traceback or in silence."""
        return status in TOLD and "Traceback" not in self.output and bool(self.output.strip())

    def go_on(self, run: Path) -> int:
        """Go on with a run; one that was killed before it had claimed its folder begins."""
        if (run / "config.yaml").exists():
            return self.command("fit", "--resume", run)
        return self.command("fit", "--config", self.recipe(run))


def outcome(run: Path) -> dict[str, Tensor]:
    """All that a run has trained, by file and name."""
    found = {}
    for part in ("base/model", "adapter/adapter_model", "model/model"):
        found |= {f"{part}.{name}": tensor for name, tensor in load_file(run / f"{part}.safetensors").items()}
    last = torch.load(newest_checkpoint(run), weights_only=True)
    found |= {f"checkpoint.{name}": value for name, value in last["state_dict"].items()}
    for number, state in last["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return found


def wrong_in(run: Path, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with a run that should be finished as the undisturbed one is; None if nothing is."""
    try:
        state = read_state(run)
        if state is None or state.name != "finished" or state.step == 0:
            return f"its state is {state}"
        if json.loads((run / "report.json").read_text())["status"] != "finished":
            return "its report is not finished"
        if damaged := damaged_files(run):
            return f"damaged: {damaged}"
        found = outcome(run)
        if found.keys() != expected.keys():
            return f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"
        differing = [name for name in found if not torch.equal(found[name], expected[name])]
        return f"other values: {differing[:3]}" if differing else None
    except Exception as error:
        return repr(error)


def tail(text: str) -> str:
    """The end of an output, for the account of what is lost."""
    return " | ".join(text.strip().splitlines()[-3:])[-400:]


def resumed(place: Workplace, run: Path, expected: dict[str, Tensor], row: Row, what: str) -> None:
    """Go on with a run, and note what became of it."""
    status = place.go_on(run)
    wrong = wrong_in(run, expected)
    if status == 0 and wrong is None:
        row.gone_on += 1
        shutil.rmtree(run)
    elif status == 0:
        row.silent.append(f"{what}: {wrong}")
    else:
        row.lost.append(f"{what}: status {status}: {tail(place.output)}")


def killed_at_writes(
    place: Workplace, expected: dict[str, Tensor], writes: int, number: int, chance: random.Random
) -> Row:
    """Killed at files' own moments: as one is opened, renamed or removed. Every third is killed again as it goes on."""
    row = Row("killed (SIGKILL) at a write in its folder")
    for case, at in enumerate(sorted(chance.sample(range(1, writes + 1), min(number, writes)))):
        run = place.folder / f"write-{at}"
        row.tried += 1
        status = place.command("fit", "--config", place.recipe(run), hook=Writes(run, at, kill))
        what = f"write {at}"
        if status != -signal.SIGKILL:
            row.lost.append(f"{what}: not killed ({status}): {tail(place.output)}")
            continue
        if case % 3 == 0 and (run / "config.yaml").exists():
            again = chance.randint(1, writes // 2)
            place.command("fit", "--resume", run, hook=Writes(run, again, kill))
            what += f", then {again}"
        resumed(place, run, expected, row, what)
    return row


def killed_at_times(
    place: Workplace, expected: dict[str, Tensor], seconds: float, number: int, chance: random.Random
) -> Row:
    """Killed at any time."""
    row = Row("killed (SIGKILL) at a random time")
    for case in range(number):
        run = place.folder / f"time-{case}"
        row.tried += 1
        child = place.start("fit", "--config", place.recipe(run))
        after = chance.uniform(0, seconds)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        place.ended(child)
        resumed(place, run, expected, row, f"after {after:.2f} s")
    return row


def full_disks(place: Workplace, expected: dict[str, Tensor], writes: int, number: int | None) -> Row:
    """A disk that is full from one write on; and, for what libraries write by themselves, from a size of file on."""
    row = Row("disk full from a write on")
    step = 1 if number is None else max(1, writes // number)
    cases: list[dict[str, int]] = [{"at": at} for at in range(1, writes + 1, step)]
    cases += [{"file_size": size} for size in ((0, 300, 3_000, 30_000) if number is None else (3_000,))]
    for case in cases:
        run = place.folder / f"full-{'-'.join(f'{k}-{v}' for k, v in case.items())}"
        row.tried += 1
        hook = Writes(run, case["at"], fill_disk) if "at" in case else None
        status = place.command("fit", "--config", place.recipe(run), hook=hook, file_size=case.get("file_size"))
        if status == 0 and (wrong := wrong_in(run, expected)) is not None:
            row.silent.append(f"{case}: {wrong}")
            continue
        if status != 0 and not place.told(status):
            row.lost.append(f"{case}: no sentence, status {status}: {tail(place.output)}")
            continue
        row.told += status != 0
        resumed(place, run, expected, row, str(case))
    return row


def flipped_bits(place: Workplace, run: Path, each: int, chance: random.Random, step: int = 1) -> Row:
    """A bit flipped in every file of a run, `each` times, and looked at by `inspect`."""
    row = Row("a flipped bit, in each file of a run")
    # A model card is a text for its reader to edit: `sparsefit push` writes it anew, from the report.
    unread = {"logs", ".lock", "README.md"}
    files = sorted(file for file in run.rglob("*") if file.is_file() and not unread.intersection(file.parts))
    for file in files[::step]:
        whole = file.read_bytes()
        for _ in range(each):
            row.tried += 1
            bit = chance.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            status, name = place.command("inspect", run), file.relative_to(run).as_posix()
            if place.told(status) and file.name in place.output:
                row.told += 1
            elif status == 0 and means_the_same(file, whole):
                row.gone_on += 1
            else:
                row.silent.append(f"{name}, bit {bit}: status {status}: {tail(place.output)}")
        file.write_bytes(whole)
    return row


def means_the_same(file: Path, whole: bytes) -> bool:
    """Whether the bit is one that nobody reads: a time of an archive's member, a space of JSON."""
    if file.suffix == ".json":
        try:
            return json.loads(file.read_text()) == json.loads(whole)
        except ValueError:
            return False
    if file.suffix != ".ckpt":
        return False
    (file.parent / "whole").write_bytes(whole)
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (file, file.parent / "whole"))
    (file.parent / "whole").unlink()
    return all(torch.equal(one[name], other[name]) for name in other)


def two_writers(place: Workplace, expected: dict[str, Tensor]) -> Row:
    """A second process that goes on with a run which another one is at work on."""
    row, run = Row("two processes on one run", tried=1), place.folder / "two"
    first = place.start("fit", "--config", place.recipe(run))
    while not (run / "state.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    try:
        status = place.command("fit", "--resume", run)
        told = place.told(status) and "another run is running" in place.output
    finally:
        os.kill(first, signal.SIGCONT)
    if not told:
        row.silent.append(f"status {status}: {tail(place.output)}")
    status = place.ended(first)
    wrong = wrong_in(run, expected)
    if status or wrong:
        row.lost.append(f"the first one: status {status}: {wrong}")
    elif told:
        row.told, row.gone_on = 1, 1
    return row


class Harmful:
    """What unpickling runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def hostile_folders(place: Workplace, run: Path, step: int = 1) -> Row:
    """Run folders that somebody else has prepared, sums and seals in order: nothing may be run, or lead out of them."""
    row, canary = Row("hostile run folders"), place.folder / "canary"
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}

    def config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            settings = yaml.safe_load((folder / "config.yaml").read_text())
            change(settings)
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))

        return prepare

    def base_elsewhere(name: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            notes = json.loads((folder / "adapter/sparsefit.json").read_text())
            (folder / "adapter/sparsefit.json").write_text(json.dumps(notes | {"base": name}))

        return prepare

    def index(name: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            for part in ("base", "model"):
                entries = {"weight_map": {"model.norm.weight": name}, "metadata": {}}
                (folder / part / "model.safetensors.index.json").write_text(json.dumps(entries))
                (folder / part / "model.safetensors").unlink()

        return prepare

    def checkpoint(folder: Path) -> None:
        for path in (folder / "checkpoints").iterdir():
            torch.save(torch.load(path, weights_only=True) | {"more": Harmful(canary)}, path)

    secret = str(shutil.copytree(run / "base", place.folder / "secret"))
    merging, going_on = ("merge", "--output={out}"), ("fit", "--trainer.max_steps=9")
    cases: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
        ("data are a Popen", config(lambda s: s.update(data=popen)), merging),
        ("data are a Popen", config(lambda s: s.update(data=popen)), going_on),
        ("the model is a Popen", config(lambda s: s.update(model=popen)), merging),
        ("the model is a Popen", config(lambda s: s.update(model=popen)), going_on),
        ("a callback is a Popen", config(lambda s: s["trainer"].update(callbacks=[popen])), going_on),
        ("the logger is a Popen", config(lambda s: s["trainer"].update(logger=popen)), going_on),
        ("a plugin is a Popen", config(lambda s: s["trainer"].update(plugins=[popen])), going_on),
        ("calibration is a Popen", config(lambda s: s["pruning"].update(calibration=popen)), going_on),
        ("a Popen inside the data", config(lambda s: s["data"]["init_args"].update(tokenizer=popen)), going_on),
        ("its base is ../secret", base_elsewhere("../secret"), merging),
        ("its base is an absolute path", base_elsewhere(secret), merging),
        *((f"an index names {name}", index(name), command)
          for name in ("../../secret/model.safetensors", f"{secret}/model.safetensors")
          for command in (merging, ("inspect",), ("export", "--format=gguf", "--output={out}"))),
        ("a checkpoint that runs what it unpickles", checkpoint, going_on),
    ]  # fmt: skip
    for what, prepare, (command, *more) in cases[::step]:
        row.tried += 1
        folder, out = place.folder / "hostile", place.folder / "out"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(run, folder)
        prepare(folder)
        reseal(folder)
        target = ("--resume", folder) if command == "fit" else (folder,)
        status = place.command(command, *target, *(argument.format(out=out) for argument in more))
        refused = place.told(status)
        measured_nothing = status == 0 and command == "merge" and "quality: not measured" in place.output
        if canary.exists():
            row.silent.append(f"{what}, {command}: it was run")
            canary.unlink()
        elif refused or measured_nothing:
            row.told += 1
        else:
            row.silent.append(f"{what}, {command}: status {status}: {tail(place.output)}")
    return row


def reseal(folder: Path) -> None:
    """Put the sums of a run folder in order, as whoever prepares one would."""
    for part in WRITTEN_FOLDERS:
        if (folder / part).is_dir():
            write_sums(folder / part)
    state = read_state(folder)
    sums = {name: file_sum(folder / name) for name in state.sums}
    replace(state, sums=sums).write(folder)


def not_finite(place: Workplace, expected: dict[str, Tensor], first: int = 0) -> Row:
    """A NaN in a loss, a gradient or a weight, at each step from `first` on; gone on with when it no longer comes."""
    row = Row("NaN in a loss, a gradient or a weight")
    for kind in ("loss", "gradient", "weight"):
        for step in range(first, place.steps):
            run, what = place.folder / f"nan-{kind}-{step}", f"{kind} of step {step}"
            row.tried += 1
            status = place.command("fit", "--config", place.recipe(run), before=lambda k=kind, s=step: go_to_nan(k, s))
            if not place.told(status):
                row.silent.append(f"{what}: status {status}: {tail(place.output)}")
                continue
            if broken := [file.name for file in written_models(run) if not_finite_in(file)]:
                row.silent.append(f"{what}: written to {broken}")
                continue
            row.told += 1
            resumed(place, run, expected, row, what)
    return row


def go_to_nan(kind: str, step: int) -> None:
    """Have a module of this process get a NaN at a step."""
    train = CausalLMModule.training_step

    def training_step(self: CausalLMModule, *args: Any) -> Tensor:
        return train(self, *args) * (math.nan if self.global_step == step else 1)

    def spoil_gradient(self: CausalLMModule) -> None:
        if self.global_step == step:
            next(p.grad for p in self.parameters() if p.grad is not None).view(-1)[0] = math.nan

    def spoil_weight(self: CausalLMModule, *_: Any) -> None:
        if self.global_step == step + 1:
            next(p for p in self.parameters() if p.requires_grad).data.view(-1)[0] = math.nan

    if kind == "loss":
        CausalLMModule.training_step = training_step
    elif kind == "gradient":
        CausalLMModule.on_after_backward = spoil_gradient
    else:
        CausalLMModule.on_train_batch_end = spoil_weight


def written_models(run: Path) -> list[Path]:
    """The files of a run that hold weights."""
    return [*run.rglob("*.safetensors"), *run.rglob("*.ckpt")]


def not_finite_in(file: Path) -> bool:
    """Whether a weight in a file is NaN or infinite."""
    tensors = torch.load(file, weights_only=True)["state_dict"] if file.suffix == ".ckpt" else load_file(file)
    return any(tensor.is_floating_point() and not bool(tensor.isfinite().all()) for tensor in tensors.values())


def matrix(folder: Path, kills: int, disk: int | None, bits: int, seed: int, only: Container[str]) -> Iterator[Row]:
    """The rows of the table, one after the other."""
    chance, place, run = random.Random(seed), Workplace(folder), folder / "straight"
    run_folder._ORPHANS_END = 0.5  # no loader of these runs has workers
    counted, start = Writes(run, sys.maxsize, kill), time.monotonic()
    status = place.command("fit", "--config", place.recipe(run), hook=counted)
    seconds, writes = time.monotonic() - start, int((folder / "count.txt").read_text())
    if status != 0:
        raise SystemExit(f"the undisturbed run failed: {place.output}")
    expected = outcome(run)
    if "kills" in only:
        yield killed_at_writes(place, expected, writes, (kills + 1) // 2, chance)
        yield killed_at_times(place, expected, seconds, kills // 2, chance)
    if "disk" in only:
        yield full_disks(place, expected, writes, disk)
    if "bits" in only:
        yield flipped_bits(place, run, bits, chance)
    if "writers" in only:
        yield two_writers(place, expected)
    if "hostile" in only:
        yield hostile_folders(place, run)
    if "nan" in only:
        yield not_finite(place, expected)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| fault | tried | resumed | reported | lost | silent |", "|---|---|---|---|---|---|"]
    for row in rows:
        counts = (row.tried, row.gone_on, row.told, len(row.lost), len(row.silent))
        lines.append(f"| {row.fault} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main() -> int:
    """Run the matrix; 1 if anything was lost or silent."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="moments to be killed at")
    parser.add_argument("--disk", type=int, help="writes to fill the disk at; by default every one")
    parser.add_argument("--bits", type=int, default=3, help="bits flipped in each file")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="some rows of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file, whose table is replaced")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in matrix(Path(folder).resolve(), given.kills, given.disk, given.bits, given.seed, given.only):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            for what, cases in (("lost", row.lost), ("silent", row.silent)):
                for case in cases:
                    print(f"  {what}: {case}", flush=True)
    print(f"\n{table(rows)}")
    if given.write is not None:
        before, _, rest = given.write.read_text(encoding="utf-8").partition("| fault |")
        after = "\n".join(line for line in rest.splitlines()[1:] if not line.startswith("|"))
        given.write.write_text(f"{before}{table(rows)}\n{after.lstrip()}", encoding="utf-8")
    return int(any(row.lost or row.silent for row in rows))


if __name__ == "__main__":
    sys.exit(main())
