"""`edgelm run` on the simulated engine: prompts, JSON, what goes to stdout and what to stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKE_CLI = str(Path(__file__).parent / "fake_cli.py")


def test_answer_on_stdout_and_facts_on_stderr(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi there", "--memory", "50MB")
    assert result.code == 0
    assert result.out == "echo: none#1 hi there\n"
    assert "simulated backend, budget 50 MB, context 64" in result.err
    assert "gave in once" in result.err
    assert "a simulated template" in result.err
    assert engine[0].closed
    assert engine[0].options == {"memory": "50MB"}


def test_quiet_leaves_stderr_empty(edgelm_command, engine, model_file):
    assert edgelm_command("run", model_file, "hi", "--quiet").err == ""


def test_json_has_the_documented_fields(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi", "--json")
    answer = result.json()
    assert result.err == ""
    assert set(answer) == {
        "text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "backend", "budget_bytes",
        "approximate", "simulated", "stats", "closed",
    }  # fmt: skip
    assert set(answer["stats"]) == {
        "ttft_s", "prefill_tps", "decode_tps", "peak_bytes", "bytes_streamed", "predicted_decode_tps",
        "elapsed_s", "compute_s", "wait_s", "sample_s", "other_s", "read_s", "kv_bytes_spilled", "kv_bytes_read",
        "passes", "drafted_tokens", "accepted_tokens", "tokens_per_pass", "bytes_per_token",
    }  # fmt: skip
    assert answer["text"] == "echo: none#1 hi"
    assert answer["token_ids"] == [100, 101, 102]
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (5, 3)
    assert answer["finish_reason"] == "stop"
    assert answer["budget_bytes"] == 100_000_000


@pytest.mark.parametrize(
    ("argv", "stdin", "asked"),
    [
        (["ask"], b"", "ask"),
        (["ask"], b"the text\n", "ask\n\nthe text"),
        ([], b"only stdin\r\n", "only stdin"),
        (["ask"], "zwölf\n\nlines".encode(), "ask\n\nzwölf\n\nlines"),
    ],
)
def test_stdin_is_joined(edgelm_command, engine, model_file, argv, stdin, asked):
    assert edgelm_command("run", model_file, *argv, "--raw", stdin=stdin).code == 0
    assert engine[0].asked == [(asked, {})]


def test_prompt_file_is_taken_byte_for_byte_and_stdin_is_left_alone(edgelm_command, engine, model_file, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b" two\nlines \n")
    edgelm_command("run", model_file, "--prompt-file", str(prompt), "--raw", stdin=b"ignored")
    assert engine[0].asked[0][0] == " two\nlines \n"


def test_sampling_options_reach_the_engine_and_others_keep_its_defaults(edgelm_command, engine, model_file):
    options = (
        "--temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --typical-p 0.8 --repeat-penalty 1.1 "
        "--presence-penalty 0.2 --frequency-penalty 0.3 --seed 7 --max-tokens 9 --overflow trim --ignore-eos "
        "--logit-bias 5=-1.5 --logit-bias 6=2 --stop END --stop STOP"
    )
    edgelm_command("run", model_file, "x", *options.split())
    assert engine[0].overflow == "trim"
    assert engine[0].asked[0][1] == {
        "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repeat_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7, "max_tokens": 9,
        "ignore_eos": True, "logit_bias": {5: -1.5, 6: 2.0}, "stop": ["END", "STOP"],
    }  # fmt: skip


def test_show_prompt(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi", "--system", "be brief", "--show-prompt", "--quiet")
    assert result.err == "<be brief|hi>\n"
    shown = edgelm_command("run", model_file, "hi", "--show-prompt", "--json").json()
    assert shown["prompt"] == "<None|hi>"


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        ([], "there is no prompt"),
        (["x", "--raw", "--system", "s"], "--system needs the chat template"),
        (["x", "--raw", "--overflow", "trim"], "--overflow is about turns"),
        (["x", "--no-such-option"], "--no-such-option"),
        (["x", "--temperature", "-1"], "-1"),
        (["x", "--logit-bias", "5"], "'5' is not ID=BIAS"),
        (["x", "--overflow", "shift"], "'shift'"),
        (["x", "--memory", "lots"], "'lots' is not a size"),
        (["x", "--prompt-file", os.devnull], "not both"),
    ],
)
def test_mistakes_exit_2(edgelm_command, engine, model_file, argv, fact):
    result = edgelm_command("run", model_file, *argv)
    assert result.code == 2
    assert result.out == ""
    assert "edgelm: error: " in result.err
    assert fact in result.err


@pytest.mark.parametrize(
    ("content", "fact"),
    [("null", "holds null, which is no JSON schema"), ("{", "is not JSON"), (None, "cannot be read")],
)
def test_a_schema_file_that_holds_none_is_refused(edgelm_command, engine, model_file, tmp_path, content, fact):
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_text(content)
    result = edgelm_command("run", model_file, "x", "--json-schema", str(schema))
    assert result.code == 2
    assert fact in result.err
    assert not engine


def test_forms_reach_the_engine(edgelm_command, engine, model_file, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "answer.gbnf"
    schema.write_text('{"type": "string"}')
    grammar.write_text('root ::= "yes"')
    edgelm_command("run", model_file, "x", "--json-schema", str(schema))
    edgelm_command("run", model_file, "x", "--grammar", str(grammar))
    edgelm_command("run", model_file, "x", "--regex", "a+")
    asked = [one.asked[0][1] for one in engine]
    assert asked == [{"json_schema": {"type": "string"}}, {"grammar": 'root ::= "yes"'}, {"regex": "a+"}]


def test_stdin_that_is_not_text(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, stdin=b"\xff\xfe")
    assert result.code == 2
    assert "not UTF-8" in result.err


def test_engine_errors_are_one_sentence_with_their_exit_code(edgelm_command, engine, model_file):
    small = edgelm_command("run", model_file, "x", "--memory", "1MB")
    assert (small.code, small.err.count("\n")) == (6, 1)
    assert small.err.startswith("edgelm: error: budget 1 MB is too small")
    assert edgelm_command("run", model_file, "overflow", "-q").code == 8


def test_ctrl_c_stops_the_answer_and_exits_130(model_file, monkeypatch):
    monkeypatch.setenv("FAKE_DELAY_S", "0.1")
    child = subprocess.Popen(
        [sys.executable, FAKE_CLI, "run", model_file, "w " * 200, "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(0.8)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=10)
    assert child.returncode == 130
    assert '"finish_reason": "cancelled"' in out


def test_a_reader_that_leaves_is_no_error(model_file, monkeypatch):
    monkeypatch.setenv("FAKE_DELAY_S", "0.02")
    child = subprocess.Popen(
        [sys.executable, FAKE_CLI, "run", model_file, "w " * 100, "-q"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.read(4) == b"echo"  # arrives while the answer is still being made
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(10) == 141


def test_a_simulated_device_is_handed_on_and_shown(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi", "--simulate", "pi5-nvme")
    assert engine[0].options == {"simulate": "pi5-nvme"}
    assert "context 64, simulated pi5-nvme" in result.err
    answer = edgelm_command("run", model_file, "hi", "--json", "--simulate", "pi5-nvme").json()
    assert answer["simulated"] == "pi5-nvme"
    assert edgelm_command("run", model_file, "hi", "--json").json()["simulated"] is None


def test_changes_of_an_adaptive_budget_are_told_after_the_answer(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi", "--adaptive")
    assert result.out == "echo: none#1 hi\n"
    assert result.err.splitlines()[-1] == "memory is short: budget 100 MB -> 80 MB"
    assert edgelm_command("run", model_file, "hi", "--adaptive", "--quiet").err == ""


def test_several_answers_the_likeliest_first(edgelm_command, engine, model_file):
    result = edgelm_command("run", model_file, "hi", "-n", "3", "--temperature", "1", "--overflow", "trim")
    assert result.code == 0
    assert result.out == "".join(f"--- {i}, mean log-probability -{i}.000\nnone hi, {i}\n" for i in (1, 2, 3))
    assert engine[0].options == {"parallel": 3}  # their room is planned
    assert (engine[0].asked, engine[0].overflow) == ([("none hi", {"temperature": 1.0})], "trim")
    answers = edgelm_command("run", model_file, "hi", "-n", "2", "--raw", "--json").json()["answers"]
    assert [one["text"] for one in answers] == ["hi, 1", "hi, 2"]
    assert set(answers[0]) == {"text", "token_ids", "mean_logprob", "finish_reason", "seed", "closed"}


def test_several_answers_have_no_logprobs_of_tokens(edgelm_command, engine, model_file):
    refused = edgelm_command("run", model_file, "hi", "-n", "2", "--json", "--logprobs", "1")
    assert refused.code == 2
    assert "give one of them" in refused.err
    assert edgelm_command("run", model_file, "hi", "-n", "1").code == 2
    assert not engine
