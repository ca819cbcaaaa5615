"""lm-evaluation-harness on a task of this folder: our log-likelihoods against those of its own transformers backend."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.peers
lm_eval = pytest.importorskip("lm_eval")

from decoder_models import TEXT, byte_tokenizer  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from gptq_jax.cli import app  # noqa: E402
from gptq_jax.harness.model import HarnessModel  # noqa: E402

PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the quick brown ", "fox"),
    ("", "the lazy dog"),
    (TEXT[:150], TEXT[150:220]),
    (TEXT, " and more"),  # longer than the context of the model
    ("世界", " 🙂"),
]
CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ("tiny_choice", "tiny_rolling", "tiny_generation")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("harness") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and no network."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": TEXT[at : at + 20], "choices": [" fox", " the dog", " 世"], "answer": at % 3, "text": TEXT[at:]}
        for at in range(0, 60, 9)
    ]
    (path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in zip(TASKS, (CHOICES, ROLLING, GENERATION), strict=True):
        (path / f"{name}.yaml").write_text(text.format(data=path / "data.json"))
    return path


@pytest.fixture(scope="module")
def both(checkpoint):
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=2)
    return HarnessModel(str(checkpoint), batch_size=4), peer


def instances(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def test_log_likelihoods_are_the_peers(both):
    ours, peers = (model.loglikelihood(instances("loglikelihood", PAIRS)) for model in both)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in peers], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in peers]


def test_rolling_log_likelihoods_are_the_peers(both):
    texts = [(TEXT * 3,), ("short",), (TEXT[:128],)]
    ours, peers = (model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for model in both)
    np.testing.assert_allclose(ours, peers, rtol=1e-5, atol=1e-4)


def test_generated_texts_are_the_peers(both):
    asked = [
        (TEXT[:30], {"until": ["zzz"], "max_gen_toks": 20}),
        (TEXT[:90], {"until": ["e", "o"], "max_gen_toks": 20, "do_sample": False}),
        (TEXT * 2, {"until": "th", "max_gen_toks": 100}),  # leaves room for little of the context
    ]
    ours, peers = (model.generate_until(instances("generate_until", asked)) for model in both)
    assert ours == peers


def test_options_that_would_be_ignored_are_refused(both):
    with pytest.raises(ValueError, match=r"\['num_beams'\] are not supported"):
        both[0].generate_until(instances("generate_until", [("a", {"num_beams": 4})]))
    with pytest.raises(ValueError, match="asks for 128 new tokens, which leaves no context"):
        both[0].generate_until(instances("generate_until", [("a", {"max_gen_toks": 128})]))


def test_whole_tasks_give_the_peers_metrics(both, tasks):
    manager = TaskManager(include_path=str(tasks))
    results = [
        simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
        for model in both
    ]
    for task in TASKS:
        ours, peers = (
            {key: value for key, value in found[task].items() if isinstance(value, float)} for found in results
        )
        assert ours.keys() == peers.keys()
        assert ours == pytest.approx(peers, rel=1e-4)


def test_our_command_and_the_harness_own_agree(checkpoint, tasks, tmp_path):
    options = ("--tasks", "tiny_choice,tiny_rolling", "--task-path", str(tasks), "--json")
    result = CliRunner(env={"TERM": "dumb"}).invoke(app, ["eval", str(checkpoint), *options])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["tasks"]
    command = ("-m", "gptq_jax.harness", "run", "--model", "gptq_jax", "--model_args", f"path={checkpoint}")
    more = ("--tasks", "tiny_choice,tiny_rolling", "--include_path", str(tasks), "--output_path", str(tmp_path))
    done = subprocess.run([sys.executable, *command, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]
    assert found["tiny_choice"]["acc,none"] == theirs["tiny_choice"]["acc,none"]
    name = "word_perplexity,none"
    assert found["tiny_rolling"][name] == pytest.approx(theirs["tiny_rolling"][name], rel=1e-5)


def test_a_chat_template_is_applied(both):
    history = [{"role": "user", "content": "hello"}]
    assert both[0].apply_chat_template(history) == both[1].apply_chat_template(history) == "[user] hello [reply]"


def test_unknown_tasks_are_a_sentence(checkpoint, tasks):
    result = CliRunner(env={"TERM": "dumb"}).invoke(
        app, ["eval", str(checkpoint), "--tasks", "no_such_task", "--task-path", str(tasks)]
    )
    assert result.exit_code == 2
    assert "there are no tasks ['no_such_task'] in the harness" in " ".join(result.stderr.split())
