"""The lm-evaluation-harness on tasks and data of this folder's own, with a tiny trained model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from sparse_lm.scoring import score
from train.cli import main
from train.run.checkpoint_reading import load_for_inference

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports, not ours to mend
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, the extra eval")

QUESTIONS = [
    {"text": "the sum of", "choices": [" our hopes", " a road", " we"], "answer": 0},
    {"text": "we walk", "choices": [" the long road", " is", " sum of"], "answer": 1},
    {"text": "a long road is", "choices": [" our", " the sum of", " walk"], "answer": 1},
    {"text": "our hopes", "choices": [" walk", " road", " is a"], "answer": 2},
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text * 4}}"
metric_list: [{metric: byte_perplexity}]
""",
    "local_until": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" "], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "local_odd": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" "], num_beams: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with four task files and their data."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, body in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        head = f"task: {name}\n{files}\n"
        (directory / f"{name}.yaml").write_text(head + body)
    return directory


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The data sets' library keeps its cache here and asks no network."""
    before = dict(os.environ)
    os.environ |= {
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    yield
    os.environ.clear()
    os.environ |= before


def evaluate(finished, tasks, capsys, *arguments):
    options = ["--checkpoint", str(finished.workdir), "--include-path", str(tasks), "--json", "-"]
    assert main(["evaluate", *options, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@needs_harness
@pytest.mark.parametrize("batch_size", [None, "1"])
def test_the_harness_gives_what_a_direct_computation_gives(finished, tasks, capsys, batch_size):
    batch = [] if batch_size is None else ["--batch-size", batch_size]
    names = "local_choice,local_rolling,local_until"
    figures = evaluate(finished, tasks, capsys, "--tasks", names, *batch)
    found = {(one["task"], one["metric"]): one for one in figures}
    model, tokenizer, _, _ = load_for_inference(finished.workdir)

    def log_likelihood(context, continuation):
        return score(model, [(tokenizer.encode(context), tokenizer.encode(continuation))])[0].log_likelihood

    def pick(question):
        return int(np.argmax([log_likelihood(question["text"], choice) for choice in question["choices"]]))

    right = [pick(question) == question["answer"] for question in QUESTIONS]
    accuracy = found["local_choice", "acc"]
    assert accuracy["value"] == np.mean(right)
    assert accuracy["samples"] == len(QUESTIONS)

    total = size = 0
    for question in QUESTIONS:
        text = [tokenizer.eos_id, *tokenizer.encode(question["text"] * 4)]
        size += len(question["text"].encode()) * 4
        # Each token behind as much text as the context of 16 has room for in windows of 16 predictions.
        for start in range(1, len(text), 16):
            end = min(start + 16, len(text))
            total += score(model, [(text[max(0, end - 17) : start], text[start:end])])[0].log_likelihood
    assert found["local_rolling", "byte_perplexity"]["value"] == pytest.approx(
        np.exp(-total / size), rel=1e-5
    )
    assert 0 <= found["local_until", "exact_match"]["value"] <= 1


@needs_harness
def test_the_tasks_of_the_paper_are_the_default(finished, monkeypatch):
    from train import harness

    asked = []

    def simple_evaluate(*, tasks, task_manager, **_):
        asked.extend(tasks)
        assert set(tasks) <= set(task_manager.all_tasks)
        return {"results": {}}

    monkeypatch.setattr("lm_eval.simple_evaluate", simple_evaluate)
    assert harness.evaluate_tasks(str(finished.workdir)) == []
    assert asked == [
        "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "commonsenseqa",
    ]  # fmt: skip


@needs_harness
def test_limit_and_table(finished, tasks, capsys):
    options = ["--checkpoint", str(finished.workdir), "--include-path", str(tasks), "--tasks", "local_choice"]
    assert main(["evaluate", *options, "--limit", "2"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "local_choice" in line)
    assert " 2 " in row


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "local_chioce"], "got 'local_chioce'; did you mean local_choice?"),
        (["--tasks", "commonsenseqa"], "the data of a task must be on this machine"),
        (["--tasks", "local_odd"], "got num_beams in a task's generation_kwargs"),
        (["--tasks", "local_choice", "--include-path", "/no/where"], "--include-path must be a directory"),
    ],
)
def test_mistakes_are_one_sentence(finished, tasks, capsys, arguments, said):
    options = ["--checkpoint", str(finished.workdir), "--include-path", str(tasks)]
    assert main(["evaluate", *options, *arguments]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert said in errors[-1]
    assert errors[-1].startswith("sparse-lm: ")


@needs_harness
def test_the_harness_own_program_finds_the_model(finished, tasks, tmp_path):
    command = [
        sys.executable, "-m", "train.harness", "run", "--model", "sparse_lm",
        "--model_args", f"checkpoint={finished.workdir}", "--tasks", "local_choice",
        "--include_path", str(tasks), "--output_path", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert "acc,none" in results["results"]["local_choice"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "2"], "--limit is for --tasks"),
        (["--tasks", "a", "--tokens", "2"], "--tokens is for the held-out text"),
        (["--tasks", "a", "--data.every-document"], "--data is for the held-out text"),
        (["--tasks", "a", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["--tasks", "a,,b"], "--tasks must be names with commas between them"),
    ],
)
def test_options_that_do_not_apply_are_refused(capsys, arguments, said):
    assert main(["evaluate", "--checkpoint", "x", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_without_the_harness_it_says_what_to_install(capsys):
    assert main(["evaluate", "--checkpoint", "x", "--tasks", "piqa"]) == 1
    assert "pip install 'sparse-lm[eval]'" in capsys.readouterr().err
