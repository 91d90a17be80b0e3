from __future__ import annotations

import copy
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from test_task_rows import ITEMS

from sparsefit.errors import ConfigError, DataError
from sparsefit.evaluation.zero_shot import TASKS, load_tasks, mean_accuracy, zero_shot
from sparsefit.modules.loading import load_causal_lm, load_tokenizer
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter


def needs_the_harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsefit[tasks]'")


@pytest.fixture
def folder(tmp_path):
    """A folder with two items of each task, in the forms of the shared files."""
    for task, (line, _) in ITEMS.items():
        (tmp_path / f"{task}.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-llama")


@pytest.fixture
def model():
    return load_causal_lm("tiny-llama")


def requests(task, limit=None):
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


@pytest.fixture
def hub(monkeypatch):
    """Has the harness's own tasks find these items on the hub."""
    import datasets

    def put(items):
        rows = datasets.Dataset.from_list(items)
        splits = datasets.DatasetDict(train=rows, validation=rows, test=rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)

    return put


# What the model is asked.

ASKED = {
    "boolq": [("Rain is wet.\nIt falls.\nQuestion: is rain wet?\nAnswer:", answer) for answer in (" no", " yes")],
    "rte": [("It rains.\nQuestion: It is wet. True or False?\nAnswer:", answer) for answer in (" True", " False")],
    "hellaswag": [("Rowing: A man rows. He", ending) for ending in (" stops.", " flies away.", " sings.", " sinks.")],
    "winogrande": [("So the Sandra", " won it."), ("So the Sandy", " won it.")],
    "arc_easy": [("Question: What is wet?\nAnswer:", answer) for answer in (" sand", " rain", " fire")],
    "openbookqa": [("Predators eat", " lions"), ("Predators eat", " bunnies")],
}
ASKED["arc_challenge"] = ASKED["arc_easy"]


@pytest.mark.parametrize("name", TASKS)
def test_items_of_a_file_are_asked_like_those_of_the_hub(folder, hub, name):
    needs_the_harness()
    local = load_tasks([name], folder)[name]
    hub([ITEMS[name][1]] * 2)
    own = load_tasks([name])[name]
    assert requests(local) == requests(own) == 2 * ASKED[name]
    assert local.VERSION == own.VERSION
    assert local.aggregation() == own.aggregation()
    assert local.config.metric_list == own.config.metric_list


def test_hellaswag_is_the_harness_s_own_on_the_real_items(shared_data, hub):
    needs_the_harness()
    local = load_tasks(["hellaswag"], shared_data / "zeroshot")["hellaswag"]
    lines = (shared_data / "zeroshot/hellaswag_val_1000.jsonl").read_text(encoding="utf-8").splitlines()
    hub([json.loads(line) for line in lines])
    found, expected = requests(local), requests(load_tasks(["hellaswag"])["hellaswag"])
    assert len(found) == 4000
    assert found == expected
    assert [local.doc_to_target(doc) for doc in local.eval_docs] == [int(json.loads(line)["label"]) for line in lines]


@pytest.mark.parametrize("name", ["winogrande", "openbookqa", "arc_easy"])
def test_the_texts_of_the_shared_files_reach_the_model(shared_data, name):
    needs_the_harness()
    task = load_tasks([name], shared_data / "zeroshot")[name]
    with open(next((shared_data / "zeroshot").glob(f"{name}*")), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][:300]
    asked = iter(requests(task, limit=300))
    for line in lines:
        if name == "winogrande":
            expected = [(context, " " + line["continuation"]) for context in line["context_options"]]
        else:
            context = line["query"] + ("\nAnswer:" if name == "arc_easy" else "")
            expected = [(context, " " + choice) for choice in line["choices"]]
        assert [next(asked) for _ in expected] == expected


# What is measured.


def slow_accuracies(model, tokenizer, asked, gold):
    """acc and acc_norm of one item, a token at a time."""
    sums = []
    for context, continuation in asked:
        start = len(tokenizer.encode(context))
        ids = torch.tensor([tokenizer.encode(context + continuation)])
        with torch.no_grad():
            losses = model(input_ids=ids).logits[0].double().log_softmax(-1)
        sums.append(sum(float(losses[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
    lengths = [len(continuation) - 1 for _, continuation in asked]
    return float(np.argmax(sums) == gold), float(np.argmax(np.array(sums) / lengths) == gold)


def test_the_accuracies(shared_data, model, tokenizer):
    needs_the_harness()
    tasks = load_tasks(["arc_easy"], shared_data / "zeroshot")
    reported = zero_shot(model, tokenizer, tasks, limit=12, batch_size=5)["arc_easy"]
    task = tasks["arc_easy"]
    asked = [request.args for request in task.instances]
    pairs = [
        slow_accuracies(model, tokenizer, asked[4 * item : 4 * item + 4], task.doc_to_target(task.eval_docs[item]))
        for item in range(12)
    ]
    acc, acc_norm = (sum(side) / 12 for side in zip(*pairs, strict=True))
    assert (reported["acc"], reported["acc_norm"]) == (acc, acc_norm)
    assert reported["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 11))
    assert (reported["items"], reported["shots"], reported["version"], reported["truncated"]) == (12, 0, 1.0, 0)
    assert reported["source"].endswith("arc_easy.jsonl")


def test_it_is_what_the_harness_finds_by_itself(folder, tokenizer, model, tmp_path):
    needs_the_harness()
    from lm_eval import simple_evaluate

    tasks = load_tasks(TASKS, folder)
    ours = zero_shot(model, tokenizer, tasks)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    reported = simple_evaluate(
        "hf",
        {"pretrained": str(tmp_path / "saved"), "dtype": "float32"},
        tasks=list(load_tasks(TASKS, folder).values()),
        device="cpu",
        bootstrap_iters=0,
    )
    assert reported["results"].keys() == ours.keys()
    for name, found in reported["results"].items():
        assert ours[name]["acc"] == found["acc,none"]
        assert ours[name].get("acc_norm") == found.get("acc_norm,none")


def test_what_is_longer_than_the_context_is_reported(folder, tokenizer, model):
    needs_the_harness()
    line, _ = ITEMS["boolq"]
    long = line | {"query": f"Passage: {'rain ' * 600}\nQuestion: is it?"}
    (folder / "boolq.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(long) + "\n")
    tasks = load_tasks(["boolq"], folder)
    assert zero_shot(model, tokenizer, tasks)["boolq"]["truncated"] == 2  # the two answers of one item
    assert zero_shot(model, tokenizer, tasks, limit=1)["boolq"]["truncated"] == 0


def test_the_mean():
    results = {"boolq": {"acc": 0.5}, "arc": {"acc": 0.25, "acc_norm": 0.9}, "wikitext": {"word_perplexity": 9.0}}
    assert mean_accuracy(results) == 0.375
    assert mean_accuracy({"wikitext": {}}) is None


# What it leaves as it was.


@pytest.mark.parametrize("adapted", [False, True])
def test_model_tokenizer_and_random_numbers_are_left_alone(folder, model, tokenizer, adapted, capfd):
    needs_the_harness()
    if adapted:
        model = attach_adapter(model, AdapterSettings())
    model.train()
    next(model.children()).eval()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    modes = [module.training for module in model.modules()]
    padding, tokenizer_state = tokenizer.padding_side, copy.deepcopy(tokenizer.special_tokens_map)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    done = []
    tasks = load_tasks(["rte", "openbookqa"], folder)
    first = zero_shot(model, tokenizer, tasks, progress=done.append)
    assert done == [1, 2]
    assert [module.training for module in model.modules()] == modes
    after = {name: (id(p), p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert {name: pair[0] for name, pair in after.items()} == {name: pair[0] for name, pair in before.items()}
    assert all(torch.equal(after[name][1], old) for name, (_, old) in before.items())
    assert (tokenizer.padding_side, tokenizer.special_tokens_map) == (padding, tokenizer_state)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert zero_shot(model, tokenizer, tasks) == first  # the tasks can be used again
    assert capfd.readouterr().err == ""


def test_an_autocast_of_the_caller_holds(folder, model, tokenizer):
    needs_the_harness()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    tasks = load_tasks(["rte"], folder)
    with torch.autocast("cpu", torch.bfloat16):
        zero_shot(model, tokenizer, tasks)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    zero_shot(model, tokenizer, tasks)
    assert set(seen) == {torch.float32}


# What cannot work.


def test_without_the_harness_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparsefit\[tasks\]'"):
        load_tasks(["rte"], folder)


def test_wrong_names(folder):
    needs_the_harness()
    with pytest.raises(ConfigError, match="no task 'hellaswg': did you mean hellaswag"):
        load_tasks(["hellaswg"])
    with pytest.raises(ConfigError, match="named twice"):
        load_tasks(["rte", "rte"], folder)
    with pytest.raises(ConfigError, match="there are no tasks"):
        load_tasks([])
    with pytest.raises(DataError, match="no local form of the task 'piqa'"):
        load_tasks(["piqa"], folder)


def test_items_that_cannot_be_fetched(monkeypatch):
    needs_the_harness()
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"cannot load the tasks rte: Couldn't reach .* give a folder"):
        load_tasks(["rte"])


@pytest.mark.parametrize("settings", [{"limit": 0}, {"limit": 1.5}, {"batch_size": 0}, {"batch_size": True}])
def test_wrong_numbers(model, tokenizer, settings):
    with pytest.raises(ConfigError, match="it must be a whole number of at least 1"):
        zero_shot(model, tokenizer, {}, **settings)


def test_a_model_without_tokenizer_or_configuration(model, tokenizer):
    with pytest.raises(ConfigError, match="need the tokenizer of LlamaForCausalLM"):
        zero_shot(model, None, {})
    with pytest.raises(ConfigError, match="which Linear is not"):
        zero_shot(torch.nn.Linear(2, 2), tokenizer, {})
