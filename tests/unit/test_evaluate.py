"""Pins `lift-ds evaluate`: scores of models whose every word is known, losses and KL against plain torch, local rows as
the harness's own columns, deltas, and what is refused.

The models that speak have a table for weights: each token is followed by one other. What they say after the prompt is
exact, so their accuracy on a file of some right and some wrong rows is too.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lift_ds import cli
from lift_ds.delta import export_delta
from lift_ds.evaluation import EvaluationRequest, evaluate, local, wording
from lift_ds.evaluation import models as models_of_evaluation
from lift_ds.evaluation.command import read, table
from lift_ds.training.data import instruction_prompt


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends a text."""
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytewise.train_from_iterator(
        [""], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")


TOKENIZER = _tokenizer()


def tiny(seed: int, vocab_size: int = len(TOKENIZER)) -> LlamaForCausalLM:
    """A small model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def speaker(said: str) -> LlamaForCausalLM:
    """A model that says this after a line break, and then ends.

    Its layers add nothing, so that what comes next depends on the last token alone.
    """
    size = len(TOKENIZER) + len(TOKENIZER) % 2
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(TOKENIZER)])
        model.lm_head.weight.zero_()
        tokens = [*TOKENIZER("\n" + said).input_ids, TOKENIZER.eos_token_id]
        for before, after in itertools.pairwise(tokens):
            model.lm_head.weight[after, before] = 1.0
    return model


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def asked(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": "", "answer": answer}


def choices(*texts: str, answer: int, question: str = "Which is it?") -> dict[str, str]:
    """A row in the wording of commonsense-170K."""
    listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(texts, start=1))
    legal = "/".join(f"answer{number}" for number in range(1, len(texts) + 1))
    opening = f"Please choose the correct answer to the question: {question}"
    return asked(f"{opening}\n\n{listed}\n\nAnswer format: {legal}", f"answer{answer}")


def accuracy(result: dict[str, Any], task: str, metric: str = "acc") -> float:
    return result["tasks"][task]["metrics"][metric]["value"]


def test_a_model_of_known_words_has_known_scores(tmp_path: Path) -> None:
    """One that says 42 is right in two rows of three; rows of other files count by number, or by the exact text."""
    sums = [asked("6 x 7?", "42.0"), asked("What is one and one?", "2"), asked("40 + 2?", "42")]
    written(tmp_path / "svamp_test200.json", sums)
    skill = written(
        tmp_path / "skill.json", [asked("a", "42"), asked("b", "42 "), asked("c", "forty"), asked("d", "4")]
    )
    request = EvaluationRequest(
        tasks=("lift_svamp",), data=str(tmp_path), rows=(str(skill),), samples=str(tmp_path / "samples.jsonl")
    )
    result = evaluate(request, model=speaker("42"), tokenizer=TOKENIZER)
    assert accuracy(result, "lift_svamp") == pytest.approx(2 / 3)
    assert result["tasks"]["lift_svamp"]["rows"] == 3
    assert accuracy(result, "skill") == pytest.approx(2 / 4)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 7
    assert samples[0]["prompt"] == instruction_prompt("6 x 7?")
    assert {sample["given"][0] for sample in samples} == {"42"}

    bare = written(tmp_path / "bare.json", [{"prompt": "6 x 7?\n", "answer": "42"}])
    request = EvaluationRequest(rows=(str(bare),), samples=str(tmp_path / "samples.jsonl"))
    assert accuracy(evaluate(request, model=speaker("42"), tokenizer=TOKENIZER), "bare") == 1
    assert json.loads((tmp_path / "samples.jsonl").read_text())["prompt"] == "6 x 7?\n"


def test_letters_words_and_labels_are_scored_and_a_group_is_the_plain_mean_of_its_sets(tmp_path: Path) -> None:
    """Sets of one and of four rows weigh the same in their group."""
    written(tmp_path / "aqua_test.json", [asked("?", "B"), asked("?", "C")])
    request = EvaluationRequest(tasks=("lift_aqua",), data=str(tmp_path))
    assert accuracy(evaluate(request, model=speaker("B"), tokenizer=TOKENIZER), "lift_aqua") == 0.5

    words = written(tmp_path / "words.json", [asked("?", "true"), asked("?", "rue"), asked("?", "2")])
    result = evaluate(EvaluationRequest(rows=(str(words),)), model=speaker("true"), tokenizer=TOKENIZER)
    assert accuracy(result, "words") == pytest.approx(1 / 3)  # the text that is the answer, not one that holds it

    question = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    yes, no = asked(question, "true"), asked(question, "false")
    names = ("piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "arc-challenge", "openbookqa")
    for name in names:
        written(tmp_path / f"{name}_test.json", [no])
    written(tmp_path / "boolq" / "test.json", [yes, yes, yes, no])
    result = evaluate(
        EvaluationRequest(tasks=("lift_commonsense",), data=str(tmp_path)), model=speaker("true"), tokenizer=TOKENIZER
    )
    assert accuracy(result, "lift_boolq") == 0.75
    assert accuracy(result, "lift_arc_easy") == 0
    assert accuracy(result, "lift_commonsense") == pytest.approx(0.75 / 8)


def test_stock_tasks_read_local_rows_in_the_harness_own_prompt(tmp_path: Path) -> None:
    """The model finds " yes" likelier than " no", whichever is first."""
    model = speaker("")
    with torch.no_grad():
        space, y = TOKENIZER(" y").input_ids
        model.lm_head.weight[y, space] = 1.0
    written(tmp_path / "arc-easy_test200.json", [choices("yes", "no", answer=1), choices("no", "yes", answer=1)])
    request = EvaluationRequest(tasks=("arc_easy",), data=str(tmp_path), samples=str(tmp_path / "samples.jsonl"))
    result = evaluate(request, model=model, tokenizer=TOKENIZER)
    assert accuracy(result, "arc_easy") == 0.5
    assert set(result["tasks"]["arc_easy"]["metrics"]) == {"acc", "acc_norm"}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["scores"]["acc"] for sample in samples] == [1, 0]
    assert samples[0]["prompt"] == "Question: Which is it?\nAnswer:"
    assert samples[0]["choices"] == [" yes", " no"]


WORDED = {
    "openbookqa": (
        choices("a jungle", "the arctic", answer=2, question="Where is it cold?"),
        {"question_stem": "Where is it cold?", "answerKey": "B",
         "choices": {"text": ["a jungle", "the arctic"], "label": ["A", "B"]}},
    ),
    "piqa": (
        asked("Please choose the correct solution to the question: Wrap a cord.\n\nSolution1: Wrap it.\n\nSolution2: "
              "Cut it: twice.\n\nAnswer format: solution1/solution2", "solution2"),
        {"goal": "Wrap a cord.", "sol1": "Wrap it.", "sol2": "Cut it: twice.", "label": 1},
    ),
    "winogrande": (
        asked("Please choose the correct answer to fill in the blank to complete the given sentence: Ann beat Bea as _ "
              "was fast.\n\nOption1: Ann Option2: Bea Answer format: option1/option2", "option1"),
        {"sentence": "Ann beat Bea as _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
    ),
    "social_iqa": (
        choices("glad", "sad", "tired", answer=3, question="Ann ran far. How does Ann feel?"),
        {"context": "Ann ran far. How does Ann", "question": "feel?", "answerA": "glad", "answerB": "sad",
         "answerC": "tired", "label": "3"},
    ),
    "hellaswag": (
        asked("Please choose the correct ending to complete the given sentence: Skiing: A man is at the top. he\n\n"
              "Ending1: goes down. Ending2: sleeps. Ending3: eats. Ending4: sings.\n\nAnswer format: "
              "ending1/ending2/ending3/ending4", "ending1"),
        {"activity_label": "Skiing", "ctx_a": "A man is at the top.", "ctx_b": "he", "label": "0",
         "endings": ["goes down.", "sleeps.", "eats.", "sings."]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", WORDED)
def test_worded_rows_become_the_columns_of_the_task(task: str) -> None:
    row, columns = WORDED[task]
    assert wording.columns(task, row["instruction"], row["answer"]) == columns


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_plain_torch(tmp_path: Path, batch_size: int) -> None:
    """Of rows with a prompt the completion and the end of text count; batches, padding and chunks change nothing."""
    model = tiny(0)
    rows = [
        {"prompt": "ab", "completion": "cdef"},
        {"prompt": "a long prompt, ", "completion": "x" * 300},
        {"prompt": "a", "completion": "b"},
    ]
    losses = []
    for row in rows:
        prompt, whole = (TOKENIZER(text).input_ids for text in (row["prompt"], "".join(row.values()) + "<end>"))
        logits = model(torch.tensor([whole])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(whole[len(prompt) :]), reduction="none"
        ))  # fmt: skip
    path = str(written(tmp_path / "rows.json", rows))
    request = EvaluationRequest(loss_on=(path,), batch_size=batch_size)
    found = evaluate(request, model=model, tokenizer=TOKENIZER)["loss"][path]
    expected = torch.cat(losses)
    assert found["tokens"] == len(expected) == 5 + 301 + 2
    assert found["value"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["stderr"] > 0
    assert (found["rows"], found["cut"]) == (3, 0)


def test_a_plain_text_is_cut_into_windows_and_text_rows_count_as_a_whole(tmp_path: Path) -> None:
    model = tiny(0)
    path = tmp_path / "story.txt"
    path.write_text("abcdefghij")
    request = EvaluationRequest(loss_on=(str(path),), window=4)
    found = evaluate(request, model=model, tokenizer=TOKENIZER)["loss"][str(path)]
    assert (found["rows"], found["tokens"]) == (3, 3 + 3 + 1)  # the first token of a piece has nothing before it
    texts = str(written(tmp_path / "texts.json", [{"text": "abc"}, {"text": "abcdefgh"}]))
    request = EvaluationRequest(loss_on=(texts,), window=4)
    found = evaluate(request, model=model, tokenizer=TOKENIZER)["loss"][texts]
    assert (found["tokens"], found["cut"]) == (3 + 3, 1)


def test_divergence_is_that_of_plain_torch_and_zero_from_itself(tmp_path: Path) -> None:
    """After each token of the prompts; the completions do not count."""
    tuned, base = tiny(0), tiny(1)
    prompts = ["ab", "a longer prompt"]
    path = str(written(tmp_path / "rows.json", [{"prompt": prompt, "completion": "c"} for prompt in prompts]))
    values = []
    for prompt in prompts:
        tokens = torch.tensor([TOKENIZER(prompt).input_ids])
        p, q = (model(tokens).logits[0].log_softmax(-1) for model in (base, tuned))
        values.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    request = EvaluationRequest(kl_on=(path,))
    found = evaluate(request, model=tuned, tokenizer=TOKENIZER, base_model=base)["kl"][path]
    assert found["value"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    assert found["tokens"] == 2 + 15
    itself = evaluate(request, model=tuned, tokenizer=TOKENIZER, base_model=tuned)["kl"][path]
    assert itself["value"] == 0
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(request, model=tuned, tokenizer=TOKENIZER, base_model=tiny(0, vocab_size=300))


def test_generation_is_greedy_and_the_same_in_any_batch(tmp_path: Path) -> None:
    """Whatever the model's own configuration asks for, which it has again afterwards."""
    model = tiny(2)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0)
    model.generation_config = own
    model.train()
    prompts = ["a", "what is this?", "b" * 70, "to be or"]
    path = str(written(tmp_path / "rows.json", [asked(prompt, "1") for prompt in prompts]))
    texts = []
    for batch_size in (1, 4):
        request = EvaluationRequest(
            rows=(path,), batch_size=batch_size, max_new_tokens=12, samples=str(tmp_path / "samples.jsonl")
        )
        evaluate(request, model=model, tokenizer=TOKENIZER)
        samples = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
        texts.append({sample["row"]: sample["given"][0] for sample in samples})
    assert model.generation_config is own
    assert model.training
    assert texts[0] == texts[1]
    model.eval()
    tokens = TOKENIZER(instruction_prompt(prompts[0])).input_ids
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert texts[0][0] == TOKENIZER.decode(tokens[-12:])


def test_the_command_loads_a_folder_prints_a_table_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = tmp_path / "model", written(tmp_path / "skill.json", [asked("6 x 7?", "42"), asked("1 + 1?", "2")])
    speaker("42").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    output = tmp_path / "result.json"
    arguments = ["evaluate", str(folder), "--rows", str(rows), "--kl_on", str(training_rows(tmp_path)), "--base"]
    arguments += [str(folder), "--limit", "1", "--device", "cpu", "--output", str(output)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "skill acc" in printed
    result = json.loads(output.read_text())
    assert table(result) in printed
    assert accuracy(result, "skill") == 1  # of the first row
    assert result["settings"]["limit"] == 1
    assert result["versions"]["lm_eval"]
    assert next(iter(result["kl"].values()))["value"] == 0


def test_a_delta_is_measured_as_the_model_that_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the base that it names, or with --base; never with another one."""
    for name, model in (("base", speaker("41")), ("tuned", speaker("42")), ("other", speaker("40"))):
        model.generation_config.eos_token_id = 7 if name == "base" else None
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    export_delta("./base", "./tuned", "delta.safetensors")
    rows = str(written(tmp_path / "skill.json", [asked("6 x 7?", "42")]))
    kept = str(training_rows(tmp_path))
    request = EvaluationRequest("delta.safetensors", rows=(rows,), loss_on=(kept,), device="cpu")
    result = evaluate(request)
    assert accuracy(result, "skill") == 1
    assert result["loss"] == evaluate(replace(request, model="tuned"))["loss"]
    assert models_of_evaluation.load("delta.safetensors", "auto", "cpu").model.generation_config.eos_token_id == 7
    Path("base").rename("moved")
    with pytest.raises(
        ValueError, match=r"MODEL 'delta.safetensors' cannot be loaded: ./base: there is no such folder"
    ):
        evaluate(request)
    parsed, _ = read(["delta.safetensors", "--base", "moved", "--rows", rows])
    assert parsed.base == "moved"
    assert accuracy(evaluate(parsed), "skill") == 1
    with pytest.raises(ValueError, match=r"is no delta of other, but of ./base: lm_head.weight has another checksum"):
        evaluate(replace(request, base="other"))
    with pytest.raises(ValueError, match="it is a file, and no delta"):
        evaluate(replace(request, model="skill.json"))


def training_rows(folder: Path) -> Path:
    return written(folder / "train.json", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to evaluate: give --tasks"),
        ("--tasks arc_easy --limit 0", "--limit 0 is below 1"),
        ("--tasks arc_easy --batch_size 0", "--batch_size 0 is below 1"),
        ("--tasks arc_easy,arc_easy", "--tasks names 'arc_easy' more than once"),
        ("--rows gone.json", "--rows gone.json: there is no such file"),
        ("--kl_on gone.json", "name it by --base"),
        ("--tasks arc_easy --base x", "--base x is for --kl_on"),
        ("--tasks arc_easy --output gone/result.json", "--output gone/result.json: cannot be written"),
        ("--data x --loss_on {rows}", "--data x is for --tasks"),
        ("--loss_on {rows}", "there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.format(rows=training_rows(tmp_path)).split()
    assert cli.main(["evaluate", str(tmp_path / "no_model"), *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("lift_mawps", "holds no file for 'mawps', such as mawps_test.json; it holds arc-easy_test.json"),
        ("lift_svmap", "no task or group 'lift_svmap' that has a form for local data; did you mean 'lift_svamp'"),
        ("boolq", "local rows lack the passage that each question is about; take lift_boolq"),
        ("gsm8k", "local rows lack the worked examples"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused(task: str, message: str, tmp_path: Path) -> None:
    written(tmp_path / "arc-easy_test.json", [choices("yes", "no", answer=1)])
    with pytest.raises(ValueError, match="--") as refused:
        evaluate(EvaluationRequest(tasks=(task,), data=str(tmp_path)), model=speaker(""), tokenizer=TOKENIZER)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "?"}, "row 2: a row needs an 'answer'"),
        ({"instruction": " ", "answer": "1"}, "row 2: a row needs an 'instruction'"),
        (asked("?", "answer1"), "row 2: 'instruction' does not end in 'Answer format:'"),
        (choices("yes", "no", answer=3), "row 2: 'answer' is 'answer3'; the instruction allows answer1, answer2"),
        ("text", "row 2: a row must be a JSON object"),
    ],
)
def test_a_malformed_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "arc_easy_test.json", [choices("yes", "no", answer=1), row])
    for read_them in (
        lambda: local.stock_rows(path, "arc_easy"),
        lambda: local.instruction_rows(path, local.need_label),
    ):
        with pytest.raises(ValueError, match="arc_easy_test") as refused:
            read_them()
        assert message in str(refused.value)


def test_generation_that_leaves_no_room_for_a_prompt_is_refused(tmp_path: Path) -> None:
    path = str(written(tmp_path / "rows.json", [asked("?", "1")]))
    request = EvaluationRequest(rows=(path,), max_new_tokens=512)
    with pytest.raises(ValueError, match="the model has 512 positions"):
        evaluate(request, model=speaker(""), tokenizer=TOKENIZER)


def test_folders_without_usable_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(training_rows(tmp_path))
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "sharded" / "global_step5").mkdir(parents=True)
    for folder, message in (("run", "name one of its checkpoints: checkpoint-5"), ("sharded", "zero_to_fp32.py")):
        assert cli.main(["evaluate", str(tmp_path / folder), "--loss_on", rows]) == 2
        assert message in capsys.readouterr().err


def test_without_the_harness_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lift_ds.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["evaluate", "anything", "--tasks", "arc_easy"]) == 2
    assert "pip install 'lift_ds[evaluation]'" in capsys.readouterr().err


def test_names_are_split_at_commas_and_spaces() -> None:
    request, output = read(["model", "--tasks", "arc_easy,", "piqa,winogrande", "lift_svamp"])
    assert request.tasks == ("arc_easy", "piqa", "winogrande", "lift_svamp")
    assert output is None
